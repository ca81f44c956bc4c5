"""Any configuration of any module is as exact as torch: odd sizes, all dtypes, all layouts."""

import math
from typing import Any

import torch
from devices import everywhere
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from tolerances import assert_as_exact
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from twins import run, run_exactly, states, torch_instead

import seqkernels

SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 64, 65, 96])
ROWS = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 24, 25, 33])
STEPS = st.sampled_from([1, 2, 3, 4, 7, 8, 9, 16, 17, 30])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@st.composite
def modules(draw) -> torch.nn.Module:
    kind = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    hidden = draw(SIZES)
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if kind == "LSTM" and hidden > 1 and draw(st.booleans()):
        options["proj_size"] = draw(st.integers(1, hidden - 1))
    if kind == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    module = getattr(seqkernels, kind)(draw(SIZES), hidden, **options).to(draw(DTYPES))
    module.recompute = draw(st.booleans())
    note(f"{module}, {module.mode}, {module.weight_ih_l0.dtype}, recompute={module.recompute}")
    return module


def scattered(x: Tensor, layout: str) -> Tensor:
    """The same values, lying elsewhere."""
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "features apart":
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    if layout == "every other row":
        return torch.stack([x, torch.full_like(x, math.nan)], 1).flatten(0, 1)[::2] if x.dim() == 2 else x
    return x


@st.composite
def calls(draw, module: torch.nn.Module) -> tuple[Any, tuple[Tensor, ...] | None, dict[str, Any], bool]:
    """(input, hx, keyword arguments, with gradients)"""
    dtype = module.weight_ih_l0.dtype
    B, T, I = draw(ROWS), draw(STEPS), module.input_size  # noqa: E741
    kind = draw(st.sampled_from(["dense", "dense", "unbatched", "packed", "lengths", "resets"]))
    B = max(B, 1) if kind in ("packed", "lengths") else B
    shape = (T, I) if kind == "unbatched" else (B, T, I) if module.batch_first else (T, B, I)
    x: Any = torch.randn(shape).to(dtype)
    kwargs: dict[str, Any] = {}
    lengths = torch.tensor([draw(st.integers(1 if kind == "packed" else 0, T)) for _ in range(B)])
    if kind == "packed":
        x = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
    elif kind == "lengths":
        kwargs["lengths"] = lengths
    elif kind == "resets":
        kwargs["resets"] = torch.rand(shape[:2]) < 0.3
    else:
        x = scattered(x, draw(st.sampled_from(["as is", "transposed", "features apart"])))
    if isinstance(module, seqkernels.LSTM) and draw(st.booleans()):
        kwargs["return_cell_states"] = True
    hx = states(module, None if kind == "unbatched" else B) if draw(st.booleans()) else None
    # The slope of relu jumps at 0: gradients of two roundings of one number may have nothing in common.
    grad = draw(st.booleans()) and not (module.mode == "RNN_RELU" and dtype.itemsize == 2)
    note(f"{kind}, {T=}, {B=}, hx {'given' if hx else 'zero'}, {list(kwargs)}, {lengths.tolist()}, {grad=}")
    return x, hx, kwargs, grad


@everywhere
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # nothing of it wears off
@given(st.data(), modules(), st.sampled_from([1, 2, 3, 5]), st.integers(0, 1000))
def test_as_exact_as_torch(data, module, threads, seed):
    torch.manual_seed(seed)
    module.reset_parameters()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    note(f"{threads=}, {seed=}")
    try:
        x, hx, kwargs, grad = data.draw(calls(module))
        ours = run(module, x, hx, grad, **kwargs)
        # oneDNN has no training in float16; the loop of single ops that torch has besides it does
        with torch_instead(), torch.backends.mkldnn.flags(enabled=module.weight_ih_l0.dtype != torch.float16):
            torchs = run(module, x, hx, grad, **kwargs)
            truth = run_exactly(module, x, hx, grad, **kwargs)
    finally:
        torch.set_num_threads(before)
    assert_as_exact(ours, torchs, truth, module.weight_ih_l0.dtype, pooled=True)
