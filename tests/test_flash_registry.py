"""PyTorch's registry of flash attention: its own operators become ours, and back."""

import pytest
import torch
from tolerances import assert_as_exact
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.testing import assert_close

from seqkernels import varlen_attention
from seqkernels.integrations import flash_attention as integration
from seqkernels.ops import attention as ops

nn_attention = torch.nn.attention
pytestmark = pytest.mark.skipif(
    not hasattr(nn_attention, "register_flash_attention_impl"), reason="this torch has no registry"
)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of our kernels that run."""
    seen = []

    def spied(name):
        function = getattr(ops, name)

        def spy(*args):
            seen.append(name)
            return function(*args)

        return spy

    for name in ("_fwd", "_bwd"):
        monkeypatch.setattr(ops, name, spied(name))
    return seen


@pytest.fixture
def active():
    integration.register()
    nn_attention.activate_flash_attention_impl("seqkernels")
    assert nn_attention.current_flash_attention_impl() == "seqkernels"
    yield
    if nn_attention.current_flash_attention_impl() is not None:
        nn_attention.restore_flash_attention_impl()


def run(q, k, v, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, **options)
    slopes = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    grads = torch.autograd.grad((out.double() * slopes).sum(), leaves)
    return {"out": out.detach()} | {f"grad_{n}": g for n, g in zip("qkv", grads, strict=True)}


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.arange(9 * 7).view(9, 7) % 3 > 0},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 2 * 9 * 7).view(2, 1, 9, 7)},
    "scale": {"scale": -0.3},
    "groups": {"enable_gqa": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sdpa_on_the_cpu(options, dtype, calls):
    integration.register()
    heads = 2 if options.get("enable_gqa") else 4
    q, k, v = (torch.randn(2, h, T, 8).to(dtype) for h, T in ((4, 9), (heads, 7), (heads, 7)))
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.to(dtype)}
    exact = {
        n: o.double() if n == "attn_mask" and mask.is_floating_point() else o for n, o in options.items()
    }
    torchs, truth = run(q, k, v, **options), run(*(t.double() for t in (q, k, v)), **exact)
    assert calls == []
    nn_attention.activate_flash_attention_impl("seqkernels")
    try:
        assert_as_exact(run(q, k, v, **options), torchs, truth, dtype, pooled=True)
        assert calls == ["_fwd", "_bwd"]
    finally:
        nn_attention.restore_flash_attention_impl()
    assert_close(run(q, k, v, **options), torchs, rtol=0, atol=0)
    assert calls == ["_fwd", "_bwd"]


def test_a_mask_less_exact_than_the_query(active, calls):
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (9, 7, 7))
    mask = torch.randn(9, 7)
    assert_close(run(q, k, v, attn_mask=mask), run(q, k, v, attn_mask=mask.double()))
    assert calls == ["_fwd", "_bwd"] * 2


def test_one_graph(active, calls):
    torch.compiler.reset()
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
    expected = run(q, k, v, is_causal=True)
    assert calls == ["_fwd", "_bwd"]
    compiled = torch.compile(F.scaled_dot_product_attention, fullgraph=True)
    leaf = q.clone().requires_grad_()
    out = compiled(leaf, k, v, is_causal=True)
    assert_close(out, expected["out"])
    out.sum().backward()
    assert calls == ["_fwd", "_bwd"] * 2


def test_other_modes_stay_torchs(active, calls):
    """Dropout, values of other sizes: torch takes its math, and so it stays."""
    q, v = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 6)
    F.scaled_dot_product_attention(q, q, v)
    F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert calls == []


def test_operators_for_gpus(calls):
    """Called by hand with CPU tensors, for which the kernels for CPUs answer."""
    q, k, v = (torch.randn(2, h, T, 8, dtype=torch.float64) for h, T in ((4, 7), (2, 9), (2, 9)))
    dout = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    mask = causal_lower_right(7, 9)._materialize()
    expected = F.scaled_dot_product_attention(*leaves, attn_mask=mask, scale=0.3, enable_gqa=True)
    grads = torch.autograd.grad(expected, leaves, dout)
    out, lse, cu_q, cu_k, max_q, max_k, rng, unused, _ = integration._scaled_dot_product_flash_attention(
        q, k, v, 0.0, True, scale=0.3
    )
    assert_close(out, expected)
    assert out.stride() == q.stride()
    assert (max_q, max_k, rng.dtype) == (7, 9, torch.uint64)
    found = integration._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, True, rng, unused, scale=0.3
    )
    assert_close(found, grads)
    assert [g.stride() for g in found] == [t.stride() for t in (q, k, v)]


@pytest.mark.parametrize("window", [(None, None), (-1, -1), (3, 1)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_layouts_of_flash_attention(window, is_causal, packed):
    """[B,T,H,D], or [N,H,D] with cumulative lengths, aligned to the last query and the last key."""
    cu_q, cu_k = torch.tensor([0, 3, 9]), torch.tensor([0, 5, 12])
    q, k, v = (torch.randn(n, h, 8, dtype=torch.float64) for n, h in ((9, 4), (12, 2), (12, 2)))
    if not packed:
        cu_q, cu_k = torch.tensor([0, 9]), torch.tensor([0, 12])
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    ours = tuple(None if w is None or w < 0 else w for w in window)
    expected, expected_lse = varlen_attention(
        *leaves, cu_q, cu_k, 9, 12, is_causal=is_causal, window=ours, return_lse=True
    )
    dout = torch.randn(9, 4, 8, dtype=torch.float64)
    grads = torch.autograd.grad(expected, leaves, dout)
    windows = {"window_size_left": window[0], "window_size_right": window[1]}
    sequences = (cu_q.int(), cu_k.int(), 9, 12) if packed else (None, None, 9, 12)
    inputs = [t if packed else t.unsqueeze(0) for t in (q, k, v, dout)]
    forward = integration._flash_attention_forward(*inputs[:3], *sequences, 0.0, is_causal, False, **windows)
    out, lse, rng, unused, _ = forward
    found = integration._flash_attention_backward(
        inputs[3], *inputs[:3], out, lse, *sequences, 0.0, is_causal, rng, unused, **windows
    )
    inplace = torch.empty_like(out)
    again = integration._flash_attention_forward_no_dropout_inplace(
        inplace, *inputs[:3], *sequences, 0.0, is_causal, False, **windows
    )
    assert torch.equal(inplace, out)
    assert torch.equal(again, lse)
    if not packed:
        out, lse, *found = (t[0] for t in (out, lse, *found))
    assert_close((out, lse, *found), (expected, expected_lse, *grads))


def test_what_is_refused():
    q = torch.randn(2, 9, 4, 8)
    dense = (q, q, q, None, None, 9, 9, 0.0, False)
    with pytest.raises(NotImplementedError, match="return_debug_mask"):
        integration._flash_attention_forward(*dense, True)
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        integration._flash_attention_forward(*dense, False, alibi_slopes=torch.rand(4))
    with pytest.raises(NotImplementedError, match="block_table_without_seqused_k"):
        integration._flash_attention_forward(*dense, False, block_table=torch.zeros(2, 1))


def test_lengths_of_a_cache():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 9, 2, 8)
    k[0, 5:] = torch.nan
    out = integration._flash_attention_forward(
        q, k, k, None, None, 3, 9, 0.0, True, False, seqused_k=torch.tensor([5, 9], dtype=torch.int32)
    )[0]
    for row, n in ((0, 5), (1, 9)):
        keys = k[row : row + 1, :n]
        alone = integration._flash_attention_forward(
            q[row : row + 1], keys, keys, None, None, 3, n, 0.0, True, False
        )
        assert_close(out[row], alone[0][0])


def test_without_a_registry_it_says_so(monkeypatch):
    monkeypatch.delattr(nn_attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"has no registry of flash attention; seqkernels.patch\(\)"):
        integration.register()
