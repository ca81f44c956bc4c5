#!/bin/sh
# All that needs a GPU, what tells most first: for a machine that is at hand for minutes, without network or virtual
# environment. Run in the repository's root; wants CUDA builds of torch and Triton, nvcc, cmake, ninja, pybind11, pytest and
# hypothesis, and is much faster with pytest-xdist; pytest-timeout stops what hangs.
#
#   tests/cuda/round.sh                      all steps
#   tests/cuda/round.sh build smoke device   some of them
#
# Logs and results go to $OUT (build/gpu-round).
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu-round}
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=1
mkdir -p "$OUT"

has() { $PYTHON -c "import $1" 2>/dev/null; }
tests="$PYTHON -m pytest -p no:cacheprovider -q -rfE --tb=short --durations=15 -m gpu"
if has pytest_timeout; then tests="$tests --timeout=90 --timeout-method=thread"; fi
if has xdist; then parallel="-n 14 --maxfail=60"; else parallel="--maxfail=20"; fi

run() { # name, seconds at most, command; an interrupt lets pytest and the benchmark say what they have
  name=$1 limit=$2 began=$(date +%s)
  shift 2
  timeout -s INT -k 25 "$limit" "$@" >"$OUT/$name.log" 2>&1
  echo "== $name: exit status $?, $(($(date +%s) - began)) s"
  tail -n 25 "$OUT/$name.log"
}

build() {
  arch=$($PYTHON -c "import torch; major, minor = torch.cuda.get_device_capability(); print(f'{major}.{minor}' + 'a' * (major == 9))")
  run build 180 env TORCH_CUDA_ARCH_LIST="$arch" $PYTHON setup.py build_ext --inplace
}
smoke() { run smoke 60 $PYTHON tests/cuda/sanitize.py; } # each kernel once
device() { run device 150 $tests $parallel tests/test_cuda_device.py -k "not two_billion"; }
modules() {
  run modules 120 $tests $parallel tests/test_ops.py tests/test_cells.py tests/test_numerics.py tests/test_extras.py \
    tests/test_functional.py tests/test_modules.py tests/test_torch_samples.py
}
bench() { run bench 90 $PYTHON -m seqkernels bench --suite gpu --filter bfloat16 --budget 0.1 --out "$OUT/gpu"; }
attention() { run attention 240 $tests $parallel tests/test_triton.py tests/test_attention_device.py tests/test_additive_device.py; }
bench_attention() { run bench-attention 90 $PYTHON -m seqkernels bench --suite gpu-attention --budget 0.1 --out "$OUT/gpu-attention"; }
sanitize() { # at the same time: each takes one core and little of the GPU
  for tool in memcheck racecheck synccheck; do
    run $tool 200 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --kernel-name kns=seqkernels \
      --report-api-errors no --error-exitcode 1 $PYTHON tests/cuda/sanitize.py &
  done
  wait
}
large() { run large 90 $tests tests/test_cuda_device.py -k two_billion; }

for step in ${*:-build smoke device modules bench attention bench_attention sanitize large}; do $step; done
