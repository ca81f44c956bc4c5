"""Every test starts from the same seed, and every tensor that nobody has filled is full of NaN."""

import os
from functools import partial

import pytest
import torch
from devices import DEVICES, on_device, other_ops
from hypothesis import settings
from isas import INSTRUCTION_SETS

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic

settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "error:seqkernels falls back",  # no test means torch when it says seqkernels
        "ignore:LSTM with projections is not supported with oneDNN",
        "ignore:TF32 acceleration on top of oneDNN",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def nan_in_fresh_memory():
    """In deterministic mode torch fills fresh tensors with NaN, in our ops too: what they forget shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session", autouse=True)
def no_tf32():
    """cuDNN's recurrent kernels use it unless told otherwise, torch's products and ours do not."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def device_still_works(request):
    """A fault of the device stays: every test after it would fail for nothing."""
    yield
    if "gpu" not in request.keywords or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(70)  # xdist names this test and goes on with a new worker
        pytest.exit(f"{request.node.nodeid} left the GPU unusable: {error}", returncode=70)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    """Each instruction set in turn."""
    active = torch.ops.seqkernels.get_isa()
    torch.ops.seqkernels.set_isa(request.param)
    yield request.param
    torch.ops.seqkernels.set_isa(active)


@pytest.fixture(params=DEVICES)
def kernels(request):
    """The recurrent kernels of each device in turn; tensors are made on the CPU."""
    if request.param == "cpu":
        yield request.param
        return
    with other_ops(partial(on_device, request.param)):
        yield request.param
