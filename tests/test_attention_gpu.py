"""Who attends on a GPU: our Triton kernels, torch's where those are faster, or torch with a warning.

CPU tensors pass for CUDA's here: who is called is what counts, and the kernels for CPUs answer.
tests/test_triton.py runs the Triton kernels themselves.
"""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import seqkernels
from seqkernels import support, triton
from seqkernels.ops import attention as ops
from seqkernels.triton import choice

BF16 = torch.bfloat16
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "h100"


class Called(TorchDispatchMode):
    """The names of our operators of attention that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("seqkernels::") and "attention" in name:
            self.names.append(name.removeprefix("seqkernels::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(support, "on_gpu", lambda x: True)
    monkeypatch.setattr(triton, "INSTALLED", True)
    monkeypatch.setattr(support, "_told", set())
    monkeypatch.delenv("SEQKERNELS_STRICT", raising=False)


def qkv(Tq=100, Tk=100, Hq=4, Hk=4, D=16, Dv=None, dtype=BF16, B=2):
    return (
        torch.randn(B, Hq, Tq, D, dtype=dtype),
        torch.randn(B, Hk, Tk, D, dtype=dtype),
        torch.randn(B, Hk, Tk, Dv or D, dtype=dtype),
    )


def ran(function, *args, **kwargs) -> list[str]:
    with Called() as called:
        function(*args, **kwargs)
    return called.names


sdpa = seqkernels.scaled_dot_product_attention
FORWARD = ["attention_fwd"]


@pytest.mark.parametrize(
    ("shape", "options", "ours"),
    [
        ({}, {}, []),  # dense half types: cuDNN and FlashAttention
        ({}, {"is_causal": True}, []),
        ({"Hk": 2}, {"enable_gqa": True}, []),
        ({}, {"dropout_p": 0.5}, []),
        ({"dtype": torch.float32}, {}, []),
        ({"dtype": torch.float32, "Hk": 2}, {"enable_gqa": True}, FORWARD),  # torch has no fused kernel
        ({"Tq": 8, "Tk": 2048}, {}, []),
        ({"Tq": 8, "Tk": 4096, "B": 64, "Hk": 1}, {"enable_gqa": True}, FORWARD),  # many heads share keys
        ({"Tq": 8, "Tk": 4096, "B": 64}, {}, []),
        ({"Tq": 8, "Tk": 4096, "B": 32, "Hk": 1}, {"enable_gqa": True}, []),
        ({"Tq": 8, "Tk": 32_768, "Hk": 1}, {"enable_gqa": True}, FORWARD),
        ({"Tq": 8, "Tk": 32_768}, {}, []),
        ({"Tq": 8}, {}, []),
        ({"Tq": 1, "Tk": 2048}, {}, []),
        ({"Tq": 20, "Tk": 8192, "B": 1}, {}, []),
        ({"Tq": 20, "Tk": 32_768, "B": 1, "dtype": torch.float32}, {}, []),
        ({"Tq": 20, "Tk": 32_768, "B": 1}, {}, FORWARD),  # one tile of queries a head
        ({"Dv": 8}, {}, FORWARD),
        ({"Tq": 20, "Tk": 20, "D": 320}, {}, []),
        ({"Tq": 20, "Tk": 20, "D": 320, "Dv": 16}, {}, FORWARD),
        ({}, {"window": (8, 0)}, FORWARD),
        ({}, {"softcap": 3.0}, FORWARD),
        ({}, {"return_lse": True}, FORWARD),
        ({"Tq": 50}, {"attn_mask": causal_lower_right(50, 100)}, []),
        ({}, {"attn_mask": causal_lower_right(100, 100)}, []),  # plainly causal
        ({}, {"attn_mask": torch.ones(100, 100, dtype=torch.bool)}, []),
        ({"Hk": 2}, {"attn_mask": torch.ones(100, 100, dtype=torch.bool), "enable_gqa": True}, FORWARD),
    ],
)
def test_sdpa(shape, options, ours):
    assert ran(sdpa, *qkv(**shape), **options) == ours


def test_values_of_another_width_are_cudnns_on_hopper(monkeypatch):
    monkeypatch.setattr(choice, "_major", lambda device: 9)
    q, k, v = qkv(Dv=8)
    assert ran(sdpa, q, k, v) == []
    assert ran(sdpa, q, k, v, is_causal=True) == []
    assert ran(sdpa, *qkv(Dv=12)) == FORWARD
    assert ran(sdpa, *qkv(Dv=8, dtype=torch.float32)) == FORWARD
    mask = torch.ones(100, 100, dtype=torch.bool)
    assert ran(sdpa, q, k, v, mask) == FORWARD
    assert ran(sdpa, q.requires_grad_(), k, v) == FORWARD


def test_results_are_the_same_whoever_attends(monkeypatch):
    q, k, v = qkv(dtype=torch.float32)
    for bias in (None, causal_lower_right(100, 100), torch.randn(100, 100)):
        assert_close(sdpa(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, bias))


def test_gradients_go_the_way_they_came():
    q, k, v = (t.requires_grad_() for t in qkv())
    for options, ours in (({"window": (8, 0)}, ["attention_fwd", "attention_bwd"]), ({}, [])):
        assert ran(lambda options=options: sdpa(q, k, v, **options).sum().backward()) == ours


def test_training_is_torchs_where_only_the_forward_was_measured():
    for options in ({"Tq": 20, "Tk": 32_768, "B": 1}, {"dtype": torch.float32, "Hk": 2}):
        q, k, v = qkv(**options)
        assert choice.why_torch(q, k, v) is None
        assert choice.why_torch(q.requires_grad_(), k, v)


def test_masks_in_training_are_ours():
    """cuDNN's gradient of q is NaN for some lengths where there is a mask."""
    q, k, v = qkv()
    mask = torch.ones(100, 100, dtype=torch.bool)
    q.requires_grad_()
    assert ran(sdpa, q, k, v, mask) == FORWARD
    with torch.no_grad():
        assert ran(sdpa, q, k, v, mask) == []
    bias = torch.zeros(100, 100, requires_grad=True)
    assert ran(sdpa, q.detach(), k, v, bias) == FORWARD


def test_dropout_reaches_the_kernel():
    assert ran(sdpa, *qkv(), window=(8, 0), dropout_p=0.5) == FORWARD


def test_varlen_and_decode():
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in qkv())
    cu = torch.tensor([0, 100, 200])
    assert ran(seqkernels.varlen_attention, q, k, v, cu, cu, 100, 100) == FORWARD
    q, k, v = qkv(Tq=1, Hq=8)
    assert ran(seqkernels.decode_attention, q, k, v, torch.tensor([100, 7])) == FORWARD


def test_pages_stay_where_they_are(monkeypatch):
    """Unless somebody wants gradients: then keys are gathered, as on the CPU."""
    seen = []

    def paged(q, k, v, table, len_k, alibi, sinks, scale, softcap, left, right, bottom_right):
        seen.append((scale, softcap, left, right, bottom_right))
        k, v = (t[table].transpose(1, 2).flatten(2, 3) for t in (k, v))
        rest = (None, None, None, len_k.long(), alibi, sinks, scale, softcap, left, right, bottom_right)
        return ops._fwd(q, k, v, *rest, 0.0, None, 0, 0)

    monkeypatch.setattr(ops, "_paged_fwd", paged)
    q, _, _ = qkv(Tq=2, Hq=4)
    _, k, v = qkv(B=6, Tk=4, Hk=2)
    lengths, table = torch.tensor([7, 9], dtype=torch.int32), torch.tensor([[2, 1, 5], [0, 3, 4]])
    options = {"block_table": table, "window": (4, 0), "softcap": 2.0, "sinks": torch.randn(4)}
    found = seqkernels.decode_attention(q, k, v, lengths, **options, return_lse=True)
    assert seen == [(0.25, 2.0, 4, 0, True)]
    gathered = seqkernels.decode_attention(
        q, k.clone().requires_grad_(), v, lengths, **options, return_lse=True
    )
    assert len(seen) == 1
    assert_close(found, gathered)
    monkeypatch.setattr(support, "on_gpu", lambda x: False)
    assert_close(found, seqkernels.decode_attention(q, k, v, lengths, **options, return_lse=True))


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"need_weights": False}, []),
        ({}, ["attention_fwd", "attention_weights"]),
        ({"need_weights": False, "key_padding_mask": torch.zeros(2, 100, dtype=torch.bool)}, []),
        ({"need_weights": False, "attn_mask": torch.ones(100, 100).triu(1).bool(), "is_causal": True}, []),
    ],
)
def test_multihead_attention(options, ours):
    module, x = seqkernels.MultiheadAttention(64, 4, batch_first=True).eval(), torch.randn(2, 100, 64)
    with torch.no_grad():
        assert ran(module, x, x, x, **options) == ours
    theirs = seqkernels.unswap_(nn.Sequential(module))[0](x, x, x, **options)[0]
    seqkernels.swap_(holder := nn.Sequential(module))
    assert_close(holder[0](x, x, x, **options)[0], theirs)


def test_multihead_attention_with_masks_in_training():
    module, x = seqkernels.MultiheadAttention(64, 4, batch_first=True), torch.randn(2, 100, 64)
    mask = torch.zeros(2, 100, dtype=torch.bool)
    assert ran(module, x, x, x, need_weights=False, key_padding_mask=mask) == FORWARD
    assert ran(module, x, x, x, need_weights=False) == []


def test_multihead_attention_with_dropout():
    module, x = seqkernels.MultiheadAttention(64, 4, dropout=0.5), torch.randn(8, 2, 64)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    assert ran(module, x, x, x, need_weights=False, key_padding_mask=mask) == FORWARD
    assert ran(module, x, x, x, need_weights=False) == []
    assert ran(module, x, x, x) == [*FORWARD, "attention_weights"]


def test_transformers_prefill(monkeypatch):
    from seqkernels.attention import attend_with_lengths

    q, k, v = qkv(Hk=2)
    assert ran(attend_with_lengths, q, k, v, is_causal=True) == []
    assert ran(attend_with_lengths, q, k, v, is_causal=True, softcap=2.0) == FORWARD
    assert ran(attend_with_lengths, q[:, :, 50:], k, v, is_causal=True, bottom_right=True) == FORWARD
    assert ran(attend_with_lengths, q, k, v, is_causal=True, bottom_right=True) == []
    q, k, v = qkv(dtype=torch.float32)
    ours, lse = attend_with_lengths(q, k, v, is_causal=True)
    assert lse is None
    monkeypatch.setattr(support, "on_gpu", lambda x: False)
    assert_close(ours, attend_with_lengths(q, k, v, is_causal=True)[0])


def test_without_triton_torch_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", False)
    q, k, v = qkv()
    with pytest.warns(UserWarning, match="needs Triton, which is not installed"):
        assert ran(sdpa, q, k, v, window=(8, 0)) == []
    assert ran(sdpa, q, k, v) == []
    lengths, table = torch.tensor([7, 9]), torch.tensor([[1], [0]])
    assert ran(seqkernels.decode_attention, q[:, :, :1], k, v, lengths, block_table=table) == []
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        sdpa(q, k, v, window=(8, 0))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"dtype": torch.float64}, "no attention kernels for torch.float64 on GPUs"),
        ({"D": 544}, "head dims from 1 to 512"),
        ({"D": 320, "dtype": torch.float32}, "head dims from 1 to 256"),
    ],
)
def test_what_the_kernels_cannot_do_torch_does(shape, reason):
    with pytest.warns(UserWarning, match=reason):
        assert ran(sdpa, *qkv(**shape)) == []


def test_old_and_foreign_gpus(monkeypatch):
    q = qkv()[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "compute capability 8.0, not 7.5" in support.why_torch_attends(q)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert support.why_torch_attends(q) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in support.why_torch_attends(q)


def test_sdpa_kernel_forbids_ours():
    q, k, v = qkv(Dv=8)
    assert ran(sdpa, q, k, v) == FORWARD
    with sdpa_kernel(SDPBackend.MATH):
        assert ran(sdpa, q, k, v) == []


def test_a_choice_is_no_fallback(monkeypatch):
    """Nothing is said, and nothing is forbidden."""
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    assert ran(sdpa, *qkv()) == []


def test_reasons_of_the_choice():
    q, k, v = qkv()
    assert "dense bfloat16" in choice.why_torch(q, k, v)
    assert "dense float32" in choice.why_torch(q.float(), k.float(), v.float())


def test_the_choice_is_never_the_slower_one_of_those_measured(monkeypatch):
    """On an H100, by more than the 5 % of a tie."""
    monkeypatch.setattr(choice, "_major", lambda device: 9)
    measured = csv.DictReader((RESULTS / "attention.csv").read_text().splitlines())
    cases = [row for row in measured if not row["window"]]
    assert len(cases) > 60
    for row in cases:
        B, Hq, Hk, Tq, Tk, D, Dv = (int(row[name]) for name in ("B", "Hq", "Hk", "Tq", "Tk", "D", "Dv"))
        options = {"dtype": getattr(torch, row["dtype"]), "requires_grad": row["mode"] == "train"}
        options["device"] = "meta"
        q = torch.empty(B, Hq, Tq, D, **options)
        k, v = torch.empty(B, Hk, Tk, D, **options), torch.empty(B, Hk, Tk, Dv, **options)
        ratio = float(row["ratio"])
        if choice.why_torch(q, k, v) is None:
            assert ratio > 0.95, row["name"]
        else:
            assert ratio < 1.05, row["name"]


def test_explain():
    module = seqkernels.MultiheadAttention(64, 4, batch_first=True).bfloat16()
    x = torch.randn(2, 1024, 64, dtype=BF16)

    def said(*inputs, **options) -> str:
        return seqkernels.explain(module, *inputs, **options).removeprefix(
            "(model): seqkernels.MultiheadAttention "
        )

    assert said() == "on cuda, bfloat16, Triton kernels, or torch's where those are faster"
    assert said(x[:, :99], x, x) == "on cuda, bfloat16, Triton kernels"
    many = x.repeat(1, 32, 1)
    assert said(x[:, :20], many, many, need_weights=False) == "on cuda, bfloat16, Triton kernels"
    assert said(x[:, :99], x, x, need_weights=False) == (
        "on cuda, bfloat16, torch's attention kernels (torch's kernels are faster at dense bfloat16)"
    )


def test_one_graph():
    """torch.compile sees one opaque call, or torch's own."""
    torch.compiler.reset()
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def call(q, k, v):
        return sdpa(q, k, v, window=(8, 0)), sdpa(q, k, v)

    torch.compile(call, backend=backend, fullgraph=True)(*qkv())
    assert sum("attention_fwd" in target for target in seen) == 1
    assert sum("scaled_dot_product_attention" in target for target in seen) == 1


def test_patched_functional():
    with seqkernels.patch():
        assert ran(lambda: F.scaled_dot_product_attention(*qkv(Dv=8))) == FORWARD


def test_additive_attention():
    q, k, v = (torch.randn(2, T, 16, requires_grad=True) for T in (5, 9, 9))
    w = torch.randn(16)

    def attend(dtype: torch.dtype) -> None:
        seqkernels.additive_attention(*(t.to(dtype) for t in (q, k, v, w))).sum().backward()

    assert ran(attend, torch.float32) == ["additive_attention_fwd", "additive_attention_bwd"]
    with pytest.warns(UserWarning, match="no attention kernels for torch.float64 on GPUs"):
        assert ran(attend, torch.float64) == []


def test_import_registers_the_kernels_and_brings_no_triton():
    code = (
        "import sys, torch, seqkernels\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "assert all(has(f'seqkernels::{name}', 'CUDA') for name in seqkernels.triton.OPS)\n"
        "assert all(has(f'seqkernels::{name}', 'CUDA') for name in seqkernels.triton.ADDITIVE_OPS)\n"
        "seqkernels.triton.register()\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
