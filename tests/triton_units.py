"""Single properties of the Triton kernels, each a function of the device."""

import itertools
import math
import mmap

import torch
import triton_additive
from triton_matrix import NO_LIMIT

import seqkernels
from seqkernels import support
from seqkernels.integrations import flash_attention
from seqkernels.ops import attention as ops
from seqkernels.reference.attention import attention, attention_weights
from seqkernels.triton import OPS, decode, launch
from seqkernels.triton.common import powers_of_two

PLAIN = (None, None, None, None, None, None)  # mask, cu_q, cu_k, len_k, alibi, sinks


def forward(q, k, v, *options, scale=0.3, window=(NO_LIMIT, NO_LIMIT, False), dropout=(0.0, None)):
    return launch.attention_fwd(q, k, v, *(options or PLAIN), scale, 0.0, *window, *dropout, 0, 0)


def backward(
    dout, q, k, v, out, lse, *options, scale=0.3, window=(NO_LIMIT, NO_LIMIT, False), need_dmask=False
):
    return launch.attention_bwd(
        dout, None, q, k, v, out, lse, *(options or PLAIN), scale, 0.0, *window, 0.0, None, 0, 0, need_dmask
    )


def head_dims(device):
    for D, Dv, dtype, tolerance in (
        (1, 256, torch.float32, 1e-5),
        (48, 96, torch.float32, 1e-5),
        (112, 72, torch.float32, 1e-5),
        (240, 33, torch.float32, 1e-5),
        (512, 2, torch.float16, 2e-3),
        (130, 320, torch.float16, 2e-3),
    ):
        q, k, v = (torch.randn(1, 1, 5, d, device=device).to(dtype) for d in (D, D, Dv))
        out, lse = forward(q, k, v, scale=D**-0.5)
        exact = attention(q.double(), k.double(), v.double(), scale=D**-0.5)
        torch.testing.assert_close(out.transpose(1, 2).double(), exact[0], rtol=tolerance, atol=tolerance)
        dq, dk, dv, _, _ = backward(out, q, k, v, out, lse, scale=D**-0.5)
        assert dq.shape == (1, 5, 1, D)
        assert dv.shape == (1, 5, 1, Dv)
        assert all(x.isfinite().all() for x in (dq, dk, dv))


def sums_of_powers_of_two(device):
    assert powers_of_two(80, 128) == (64, 16)
    assert powers_of_two(112, 128) == (64, 32, 16)
    assert powers_of_two(192, 128) == (128, 64)
    assert powers_of_two(80, 32) == (32, 32, 16)
    for dim in range(1, 513):
        for widest in (32, 128):
            parts = powers_of_two(dim, widest)
            assert dim <= sum(parts) < max(1.15 * dim, dim + 16), (dim, parts)
            assert len(parts) <= dim // widest + 3
            assert max(parts) <= widest


def rows_that_see_nothing(device):
    """out 0, LSE -inf, gradients 0: never NaN, whether a mask, a window or a length hides the keys."""
    q, k, v = (torch.randn(2, 1, 20, 16, device=device) for _ in range(3))
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool, device=device)
    mask[..., 3:18, :] = False
    for options, window, hidden in (
        ((mask, *PLAIN[1:]), (NO_LIMIT, NO_LIMIT, False), slice(3, 18)),
        ((torch.where(mask, 0.0, -math.inf), *PLAIN[1:]), (NO_LIMIT, 0, False), slice(3, 18)),
        (PLAIN, (-5, NO_LIMIT, False), slice(15, 20)),
        (
            (None, None, None, torch.zeros(2, dtype=torch.long, device=device), None, None),
            (9, 9, True),
            slice(0, 20),
        ),
    ):
        out, lse = forward(q, k, v, *options, window=window)
        assert (out[:, hidden] == 0).all()
        assert (lse[..., hidden] == -math.inf).all()
        grads = backward(torch.ones_like(out), q, k, v, out, lse, *options, window=window)[:3]
        assert (grads[0][:, hidden] == 0).all()
        assert all(x.isfinite().all() for x in grads)


def rows_hidden_by_finite_masks(device):
    """Their output is the mean, as torch's, weights sum to 1, and gradients are those of the mean, though the
    LSE has no digits left for the number of keys."""
    q, k, v = (torch.randn(1, h, n, 16, device=device) for h, n in ((2, 20), (1, 133), (1, 133)))
    dout = torch.randn(1, 20, 2, 16, device=device)
    least = torch.finfo(torch.float32).min
    for hiding, sinks in itertools.product(
        (-1e4, -397124374.8651747, -1079102346.3582563, least), (None, -1e9)
    ):
        mask = torch.zeros(1, 1, 20, 133, device=device)
        mask[..., 4, :] = hiding
        sinks = sinks if sinks is None else torch.full((2,), sinks, device=device)
        options = (mask, None, None, None, None, sinks)
        out, lse = forward(q, k, v, *options)
        parts = in_parts(3, q, k, v, *options)
        torch.testing.assert_close(parts, (out, lse), rtol=1e-5, atol=1e-5)
        if hiding < -1e8 and sinks is None:  # where one unit in the last place is more than all logits
            torch.testing.assert_close(out[:, 4], v.mean(2).expand(-1, 2, -1), rtol=1e-5, atol=1e-5)
        exact = [t.double().requires_grad_() for t in (q, k, v)]
        scores = 0.3 * exact[0] @ exact[1].transpose(-1, -2)
        if hiding < -1e8:  # they lose their values, not their slopes
            scores = scores - torch.zeros_like(scores).index_copy(
                2, torch.tensor([4], device=device), scores[:, :, 4:5].detach()
            )
        logits = scores + mask.double()
        if sinks is not None:
            logits = torch.cat([logits, sinks.double().view(1, 2, 1, 1).expand(1, 2, 20, 1)], -1)
        expected = logits.softmax(-1)[..., :133] @ exact[2]
        truth = torch.autograd.grad(expected, exact, dout.transpose(1, 2).double())
        grads = backward(dout, q, k, v, out, lse, *options)[:3]
        for got, want in zip((out, *grads), (expected, *truth), strict=True):
            torch.testing.assert_close(got.transpose(1, 2).double(), want, rtol=2e-3, atol=2e-3)
        weights = launch.attention_weights(
            q, k, lse, mask, None, None, 0.3, 0.0, NO_LIMIT, NO_LIMIT, False, 0.0, None, False
        )
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 20, device=device), msg=str(hiding))


def no_queries_or_keys(device):
    for B, H, Tq, Tk in ((2, 2, 0, 5), (2, 2, 5, 0), (0, 2, 5, 5), (2, 0, 5, 5), (2, 0, 40, 40)):
        q, k, v = (torch.randn(B, H, T, 16, device=device) for T in (Tq, Tk, Tk))
        out, lse = forward(q, k, v)
        assert out.shape == (B, Tq, H, 16)
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        grads = backward(torch.ones_like(out), q, k, v, out, lse)
        assert all((x == 0).all() for x in grads[:3])
        for shape in ((1, 1, Tq, Tk), (1, 1, 1, Tk), (1, 1, Tq, 1), (1, 1, 1, 1)):
            mask = torch.zeros(shape, device=device)
            dmask = backward(torch.ones_like(out), q, k, v, out, lse, mask, *PLAIN[1:], need_dmask=True)[3]
            assert dmask.shape == shape
            assert (dmask == 0).all(), shape


def rows_far_apart(device):
    """Their offsets pass 2^31. They lie in the middle of memory that nobody touches otherwise."""
    T, D, row, size = 140, 16, 2**24 - 16, 5 * 2**30
    if device == "cpu":
        lazy = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, 2 * size, lazy), dtype=torch.float16)
    else:
        memory = torch.empty(size, dtype=torch.float16, device=device)
    far = memory.as_strided((3, 1, 1, T, D), (D, 0, 0, row, 1), size // 2)
    near, mask = torch.randn(3, 1, 1, T, D, device=device).half(), torch.randn(1, 1, T, T, device=device)
    far.copy_(near)
    results = []
    for q, k, v in (near, far):
        out, lse = forward(q, k, v, mask, *PLAIN[1:])
        grads = backward(v.transpose(1, 2), q, k, v, out, lse, mask, *PLAIN[1:], need_dmask=True)
        rest = mask, None, None, 0.3, 0.0, NO_LIMIT, NO_LIMIT, False, 0.0, None, False
        results.append((out, lse, *grads[:4], launch.attention_weights(q, k, lse, *rest)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def large_logits(device):
    """Scores of 1e4 and a mask of 1e4: the softmax is a choice, and it is torch's."""
    q, k, v = (torch.randn(1, 1, 20, 16, device=device) for _ in range(3))
    mask = 1e4 * torch.randn(1, 1, 20, 20, device=device)
    out, lse = forward(100 * q, 100 * k, v, mask, *PLAIN[1:])
    exact, exact_lse = attention(100 * q.double(), 100 * k.double(), v.double(), mask=mask, scale=0.3)
    torch.testing.assert_close(out.transpose(1, 2).double(), exact, rtol=0, atol=2e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=0)


def nan_behind_the_keys(device):
    """What lies behind len_k is not read, and its gradients are 0."""
    q, k, v = (torch.randn(2, 1, 20, 16, device=device) for _ in range(3))
    len_k = torch.tensor([7, 16], device=device)
    for b, n in enumerate(len_k.tolist()):
        k[b, :, n:], v[b, :, n:] = math.nan, math.nan
    options = (None, None, None, len_k, None, None)
    out, lse = forward(q, k, v, *options)
    exact, _ = attention(q.double(), k.double(), v.double(), len_k=len_k, scale=0.3)
    torch.testing.assert_close(out.transpose(1, 2).double(), exact, rtol=1e-5, atol=1e-5)
    _, dk, dv, _, _ = backward(torch.ones_like(out), q, k, v, out, lse, *options)
    assert (dk[0, 7:] == 0).all()
    assert (dv[1, 16:] == 0).all()
    assert dk.isfinite().all()


def mean_weights(device):
    q, k = torch.randn(2, 4, 19, 24, device=device), torch.randn(2, 2, 27, 24, device=device)
    _, lse = forward(q, k, k)
    args = (None, None, None, 0.3, 0.0, NO_LIMIT, NO_LIMIT, False, 0.0, None, True)
    exact = attention_weights(q.double(), k.double(), mean=True, scale=0.3)
    torch.testing.assert_close(
        launch.attention_weights(q, k, lse, *args).double(), exact, rtol=1e-5, atol=1e-6
    )


def dropout_keeps_the_right_share(device):
    q = torch.randn(1, 1, 32, 16, device=device)
    rng = torch.tensor([3, 9], device=device)
    assert (forward(q, q, q, dropout=(1.0, rng))[0] == 0).all()
    for dropout, wrong in (((0.5, None), "expected rng"), ((1.5, rng), "between 0 and 1, got 1.5")):
        try:
            forward(q, q, q, dropout=dropout)
        except RuntimeError as error:
            assert wrong in str(error)  # noqa: PT017 (no pytest in this process)
        else:
            raise AssertionError(f"no error with dropout {dropout}")


def paged(device):
    """Pages in any order give what the same keys give in a row; unused entries of the table are not read."""
    B, Hq, Hk, D, Dv, page = 2, 4, 2, 24, 40, 4
    len_k = torch.tensor([27, 5], device=device)
    pages_k, pages_v = (torch.randn(16, page, Hk, d, device=device).transpose(1, 2) for d in (D, Dv))
    table = torch.full((B, 8), 10**6, dtype=torch.int32, device=device)
    order = torch.randperm(16, device=device).int()
    table[0, :7], table[1, :2] = order[:7], order[7:9]
    k, v = (torch.zeros(B, Hk, 28, d, device=device) for d in (D, Dv))
    for b, n in enumerate(len_k.tolist()):
        for j in range(n):
            k[b, :, j] = pages_k[table[b, j // page], :, j % page]
            v[b, :, j] = pages_v[table[b, j // page], :, j % page]
    for Tq in (1, 3):
        q = torch.randn(B, Hq, Tq, D, device=device)
        out, lse = launch.paged_attention_fwd(
            q, pages_k, pages_v, table, len_k, None, None, 0.3, 0.0, NO_LIMIT, 0, True
        )
        exact, exact_lse = attention(
            *(x.double() for x in (q, k, v)), len_k=len_k, scale=0.3, right=0, bottom_right=True
        )
        torch.testing.assert_close(out.transpose(1, 2).double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def in_parts(splits, *arguments):
    """`forward` with the keys split among so many programs."""
    usual, decode.key_splits = decode.key_splits, lambda *_: splits
    try:
        return forward(*arguments)
    finally:
        decode.key_splits = usual


def many_splits(device):
    """More parts than `combine` reads at a time, most of them empty."""
    q, k, v = (torch.randn(1, 2, T, 16, device=device) for T in (3, 200, 200))
    sinks = torch.randn(2, device=device)
    out, lse = in_parts(37, q, k, v, *PLAIN[:5], sinks)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), sinks=sinks, scale=0.3)
    torch.testing.assert_close(out.transpose(1, 2).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def wrong_lengths(device):
    """Lengths and offsets that lie: nothing outside the tensors is read or written."""
    q, k, v = (torch.randn(1, 1, 20, 16, device=device) for _ in range(3))
    wide = [torch.full((1, 1, 60, 16), math.nan, device=device) for _ in range(3)]
    for inner, outer in zip((q, k, v), wide, strict=True):
        outer[:, :, 20:40] = inner
    inner = [outer[:, :, 20:40] for outer in wide]
    for lengths, exact in ((10**6, 20), (-3, 0)):
        options = (None, None, None, torch.tensor([lengths], device=device), None, None)
        out, lse = forward(*inner, *options)
        truth = attention(
            *(x.double() for x in (q, k, v)), len_k=torch.tensor([exact]).to(device), scale=0.3
        )[0]
        torch.testing.assert_close(out.transpose(1, 2).double(), truth, rtol=1e-5, atol=1e-5)
        grads = backward(torch.ones_like(out), *inner, out, lse, *options)
        assert all(x.isfinite().all() for x in grads[:3])
    cu = torch.tensor([-5, 12, 10**6], device=device)
    out, lse = launch.attention_fwd(
        *inner, None, cu, cu, *PLAIN[3:], 0.3, 0.0, NO_LIMIT, 0, True, 0.0, None, 20, 20
    )
    assert out.isfinite().all()


def what_they_refuse(device):
    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype, device=device)

    q = zeros(1, 2, 4, 16)
    wrong = zeros(1, 3, 4, 16)
    for tensors, options, words in (
        ([zeros(1, 1, 4, 16, dtype=torch.float64)] * 3, PLAIN, "float64"),
        ([zeros(1, 1, 4, 257)] * 3, PLAIN, "256"),
        ([zeros(1, 1, 4, 513, dtype=torch.float16)] * 3, PLAIN, "512"),
        ([zeros(1, 1, 4, 0)] * 3, PLAIN, "256"),
        ([q, q.half(), q], PLAIN, "one dtype"),
        ([q, wrong, wrong], PLAIN, "multiple"),
        ([q, q, zeros(1, 2, 5, 16)], PLAIN, "Tk,Dv"),
        ([q, q, q], (zeros(1, 1, 4, 4, dtype=torch.int32), *PLAIN[1:]), "mask"),
        ([q, q, q], (zeros(1, 1, 4, 3), *PLAIN[1:]), "expand"),
        ([q, q, q], (*PLAIN[:3], zeros(2, dtype=torch.int64), None, None), "len_k"),
        ([q, q, q], (*PLAIN[:5], zeros(3)), "sinks"),
        ([q, q, q], (*PLAIN[:3], torch.zeros(1, dtype=torch.int64, device="meta"), None, None), "where q is"),
        ([q, q, q], (None, zeros(2, dtype=torch.int64), *PLAIN[2:]), "Hq a multiple"),
    ):
        try:
            forward(*tensors, *options)
        except RuntimeError as error:
            assert words in str(error), (words, error)  # noqa: PT017
        else:
            raise AssertionError(words)


def public_functions(device):
    """From the functions that users call to these kernels, with and without gradients, and back."""
    if device == "cpu":
        support.on_gpu = lambda x: True
        ops._fwd, ops._bwd, ops._weights, ops._paged_fwd = (getattr(launch, name) for name in OPS)
    to = {"device": device}

    def check(function, *tensors, **options):
        leaves = [t.clone().requires_grad_() for t in tensors]
        truths = [t.double().cpu().requires_grad_() for t in tensors]
        out, truth = function(*leaves, **options), function(*truths, **options)
        torch.testing.assert_close(out.double().cpu(), truth, rtol=1e-5, atol=1e-5)
        dout = torch.randn_like(truth)
        grads = torch.autograd.grad(out, leaves, dout.to(out))
        for ours, theirs in zip(grads, torch.autograd.grad(truth, truths, dout), strict=True):
            torch.testing.assert_close(ours.double().cpu(), theirs, rtol=1e-4, atol=1e-4)

    q, k, v = torch.randn(2, 4, 9, 16, **to), torch.randn(2, 2, 20, 16, **to), torch.randn(2, 2, 20, 8, **to)
    sinks = torch.randn(4, **to)

    def windowed(q, k, v, mask, sinks):
        options = {"window": (9, 2), "softcap": 2.0, "enable_gqa": True}
        return seqkernels.scaled_dot_product_attention(q, k, v, mask, sinks=sinks, **options)

    check(windowed, q, k, v, torch.randn(9, 20, **to), sinks)
    mha = seqkernels.MultiheadAttention(32, 2, batch_first=True, **to)
    x, gone = torch.randn(2, 10, 32, **to), torch.arange(10, **to) >= torch.tensor([[10], [6]], **to)
    out, weights = mha(x, x, x, key_padding_mask=gone)
    exact = seqkernels.unswap_(torch.nn.Sequential(mha))[0](x, x, x, key_padding_mask=gone)
    torch.testing.assert_close((out, weights), exact, rtol=1e-4, atol=1e-5)

    table, lengths = torch.tensor([[2, 1, 5], [0, 3, 4]], **to), torch.tensor([7, 9], dtype=torch.int32, **to)
    pages = torch.randn(6, 2, 4, 16, **to), torch.randn(6, 2, 4, 8, **to)
    options = {"window": (4, 0), "sinks": sinks, "return_lse": True}
    found = seqkernels.decode_attention(q[:, :, :2], *pages, lengths, block_table=table, **options)
    dense = (t[table].transpose(1, 2).flatten(2, 3) for t in pages)
    exact = seqkernels.decode_attention(q[:, :, :2], *dense, lengths, **options)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def torchs_registry(device):
    """Torch's flash operators on these kernels: dropout replayed from the state that torch keeps, pages."""
    before = ops._fwd, ops._bwd, ops._paged_fwd
    if device == "cpu":
        ops._fwd, ops._bwd, ops._paged_fwd = (
            launch.attention_fwd,
            launch.attention_bwd,
            launch.paged_attention_fwd,
        )
    try:
        q, k, v = (torch.randn(2, h, T, 16, device=device) for h, T in ((4, 19), (2, 27), (2, 27)))
        out, lse, *sizes, rng, unused, _ = flash_attention._scaled_dot_product_flash_attention(
            q, k, v, 0.3, True
        )
        dout = torch.randn_like(out)
        grads = flash_attention._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, *sizes, 0.3, True, rng, unused
        )
        dropped = {"dropout": 0.3, "rng": rng.view(torch.int64).cpu()}
        leaves = [t.double().cpu().requires_grad_() for t in (q, k, v)]
        exact, exact_lse = attention(*leaves, scale=0.25, right=0, bottom_right=True, **dropped)
        wanted = (exact, exact_lse, *torch.autograd.grad(exact, leaves, dout.double().cpu()))
        found = [t.double().cpu() for t in (out, lse, *grads)]
        torch.testing.assert_close(tuple(found), wanted, rtol=1e-4, atol=1e-4)

        pages = [torch.randn(6, 4, 2, 16, device=device) for _ in range(2)]
        table = torch.tensor([[2, 1, 5], [0, 3, 4]], dtype=torch.int32, device=device)
        few, lengths = q[:, :, :3].transpose(1, 2), torch.tensor([7, 12], dtype=torch.int32, device=device)
        out = flash_attention._flash_attention_forward(
            few, *pages, None, None, 3, 12, 0.0, True, False, seqused_k=lengths, block_table=table
        )[0]
        dense = (t[table.long()].flatten(1, 2).transpose(1, 2).double() for t in pages)
        exact, _ = attention(
            few.transpose(1, 2).double(), *dense, scale=0.25, right=0, bottom_right=True, len_k=lengths.long()
        )
        torch.testing.assert_close(out.double(), exact.transpose(1, 2), rtol=1e-4, atol=1e-4)
    finally:
        ops._fwd, ops._bwd, ops._paged_fwd = before


ALL = (
    head_dims,
    sums_of_powers_of_two,
    rows_that_see_nothing,
    rows_hidden_by_finite_masks,
    no_queries_or_keys,
    rows_far_apart,
    large_logits,
    nan_behind_the_keys,
    mean_weights,
    dropout_keeps_the_right_share,
    paged,
    many_splits,
    wrong_lengths,
    what_they_refuse,
    torchs_registry,
    public_functions,
)
UNITS = {f.__name__: f for f in ALL} | triton_additive.UNITS
