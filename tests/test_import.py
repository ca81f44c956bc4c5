"""What `import seqkernels` costs and touches, each time in a fresh interpreter."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys, time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
before = set(sys.modules)
start = time.perf_counter()
import seqkernels
ours_s = time.perf_counter() - start
print(json.dumps({
    "torch_s": torch_s, "ours_s": ours_s, "cuda": torch.cuda.is_initialized(),
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "ops": hasattr(torch.ops.seqkernels, "lstm_layer_fwd"),
}))
"""


def run_python(code: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def probe() -> dict:
    result = run_python(PROBE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_import_registers_the_ops(probe):
    assert probe["ops"]


def test_import_is_fast(probe):
    """A machine can be busy, so the best of three counts. torch itself is in memory when ours is timed."""
    times = [probe, *(json.loads(run_python(PROBE).stdout) for _ in range(2))]
    assert min(t["ours_s"] / t["torch_s"] for t in times) < 0.25


def test_import_does_not_initialise_cuda(probe):
    assert not probe["cuda"]


def test_import_stays_lean(probe):
    heavy = {"matplotlib", "onnx", "onnxruntime", "pandas", "rich", "jinja2", "hypothesis", "pytest", "scipy"}
    assert not heavy & set(probe["modules"])


def test_public_names_exist():
    import seqkernels

    assert {"LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"} <= set(seqkernels.__all__)
    assert {"swap_", "unswap_", "patch", "explain"} <= set(seqkernels.__all__)
    for name in seqkernels.__all__:
        value = getattr(seqkernels, name)
        assert getattr(value, "__module__", value.__name__).startswith("seqkernels"), name


def load_error(code: str, library: str) -> str:
    result = run_python(f"import sys, torch, pathlib\nfrom seqkernels.ops import _library\n{code}", library)
    assert "ImportError" in result.stderr, result.stderr
    return result.stderr


def test_missing_library_says_what_to_do(tmp_path):
    error = load_error("_library.load(pathlib.Path(sys.argv[1]))", str(tmp_path / "_ops.so"))
    assert "_ops.so is missing" in error
    assert "make build" in error


def test_foreign_library_says_what_to_do(tmp_path):
    library = tmp_path / "_ops.so"
    library.write_bytes(b"\x7fELF made for something else")
    error = load_error("_library.load(pathlib.Path(sys.argv[1]))", str(library))
    assert "cannot load its native library" in error
    assert "make clean build" in error


def test_old_torch_says_what_to_do():
    error = load_error("torch.__version__ = type(torch.__version__)('2.9.1')\n_library.load()", "")
    assert "needs torch >= 2.11, got 2.9.1" in error
