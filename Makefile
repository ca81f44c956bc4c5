# `make bench` and `make test` set up all they need: a virtual environment, the pinned requirements, the native build.
# The first run downloads and compiles; later ones reuse that and rebuild only what changed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ISAS ?= avx512 avx2 baseline
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Warnings are errors here; someone who only installs the package with a newer compiler is spared them.
export CMAKE_ARGS ?= -DCMAKE_COMPILE_WARNING_AS_ERROR=ON

# Half of the suite is Python, which keeps one core busy: two processes, a file of tests each, take 10 minutes where
# one took 17. Threads that wait give their core to the other process. (`PYTEST_ARGS="-n0 --pdb"`: one process.)
PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist loadfile

# CUDA kernels for two architectures: compiling for all that wheels carry takes three times as long.
build/.installed: export TORCH_CUDA_ARCH_LIST ?= 8.0 9.0a

.PHONY: bench test test-isa build lint format sanitize sanitize-gpu wheel sdist clean distclean

bench: build
	seqkernels bench --suite quick
	$(PY) examples/language_model.py

test: build
	$(PYTEST) $(PYTEST_ARGS)

# The suite with each instruction set forced in turn; `ISAS="avx2 baseline"` chooses others.
test-isa: build
	@set -e; for isa in $(ISAS); do echo "== SEQKERNELS_CPU_ISA=$$isa"; SEQKERNELS_CPU_ISA=$$isa $(PYTEST) --ignore=tests/test_build.py $(PYTEST_ARGS); done

build: build/.installed

lint: $(VENV)/.requirements
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.requirements
	ruff check --fix .
	ruff format .
	clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# The torch-free kernels and their C++ test driver under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.requirements
	cmake -G Ninja -S . -B build/sanitize -DSEQKERNELS_SANITIZE=address,undefined -DSEQKERNELS_PYTHON=OFF -DSEQKERNELS_TESTS=ON
	cmake --build build/sanitize
	build/sanitize/seqkernels_test

# Every CUDA kernel under compute-sanitizer. Needs a CUDA device and a CUDA build of torch; without torch's cache of
# device memory every tensor is an allocation of its own, whose ends are watched.
sanitize-gpu: build
	@set -e; for tool in memcheck racecheck synccheck; do echo "== $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --kernel-name kns=seqkernels --report-api-errors no --error-exitcode 1 \
	    $(PY) tests/cuda/sanitize.py; done

wheel: $(VENV)/.requirements
	rm -rf build/lib* # setuptools would pack modules that are gone from the sources
	$(PY) -m build --wheel --no-isolation

sdist: $(VENV)/.requirements
	$(PY) -m build --sdist --no-isolation

clean:
	rm -rf build dist *.egg-info seqkernels/*.so

distclean: clean
	rm -rf $(VENV)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "seqkernels needs Python >= 3.10, $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo 'int main() {}' | $${CXX:-c++} -std=c++20 -fsyntax-only -x c++ - || { \
	  echo "seqkernels needs a C++20 compiler (GCC >= 12 or Clang >= 14), $${CXX:-c++} is none. Install one (Debian, Ubuntu: apt install g++) or name it: make CXX=/path/to/g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements-dev.txt | $(PY)
	$(PY) -m pip install -r requirements-dev.txt
	@touch $@

build/.installed: $(VENV)/.requirements $(NATIVE)
	$(PY) setup.py build_ext --inplace # pip would do it too, but without showing progress
	$(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@
