"""The projections of attention on the CPU: torch.nn.functional.linear, held to its own exactness."""

import pytest
import torch
from layouts import apart, with_one_on_meta
from tolerances import assert_as_exact
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from seqkernels.ops.linear import linear

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Rows that are read as they lie, a block of them and more; inputs of several passes; sizes around the vector.
SIZES = [
    (1, 1, 1),
    (8, 33, 40),
    (11, 33, 40),
    (12, 32, 64),
    (13, 33, 64),
    (96, 16, 48),
    (200, 70, 33),
    (97, 96, 1024),
    (60, 40, 2100),
    (2100, 24, 17),
]


def run(function, x, w, b, dy):
    """y and all gradients, in the order of the arguments."""
    leaves = {n: t.detach().requires_grad_() for n, t in (("x", x), ("w", w), ("b", b)) if t is not None}
    y = function(leaves["x"], leaves["w"], leaves.get("b"))
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}


def problem(M, N, K, dtype, bias=True):
    x, w, b, dy = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N), torch.randn(M, N)
    return [t.to(dtype) if t is not None else None for t in (x, w, b if bias else None, dy)]


def check(x, w, b, dy, dtype):
    exact = run(F.linear, *(None if t is None else t.double() for t in (x, w, b, dy)))
    assert_as_exact(run(linear, x, w, b, dy), run(F.linear, x, w, b, dy), exact, dtype, pooled=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_as_exact_as_torch(size, dtype, bias, isa):
    check(*problem(*size, dtype, bias), dtype)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(count, dtype, threads):
    args = problem(500, 200, 1100, dtype)
    threads(1)
    alone = run(linear, *args)
    threads(count)
    check(*args, dtype)
    assert all(torch.equal(t, alone[name]) for name, t in run(linear, *args).items())


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (20, 3, 0), (0, 0, 0)], ids=str)
def test_nothing(size):
    args = problem(*size[:2], max(size[2], 1), torch.float32)
    args[:2] = (t[:, : size[2]] for t in args[:2])
    torch.testing.assert_close(run(linear, *args), run(F.linear, *args))


def test_leading_dimensions_and_strides():
    x, w, b = torch.randn(2, 7, 3, 40), torch.randn(12, 80)[:, ::2], torch.randn(24)[::2]
    for view in (
        x,
        x.transpose(0, 1),
        x[..., 4:20].repeat(1, 1, 1, 3)[..., :40],
        x[0],
        x[0, 0, 0],
        x.flip(1),
    ):
        torch.testing.assert_close(linear(view, w, b), F.linear(view, w, b))
    wide = torch.randn(30, 64)[:, :40]
    torch.testing.assert_close(linear(wide, w, b), F.linear(wide, w, b))
    torch.testing.assert_close(
        linear(x[:1].expand(9, -1, -1, -1), w, b), F.linear(x[:1].expand(9, -1, -1, -1), w, b)
    )


def test_gradients_that_are_expanded_or_transposed():
    x, w = torch.randn(20, 24, requires_grad=True), torch.randn(16, 24, requires_grad=True)
    for dy in (torch.ones(1, 1).expand(20, 16), torch.randn(16, 20).t(), torch.randn(20, 1).expand(20, 16)):
        ours, theirs = (torch.autograd.grad(f(x, w, None), (x, w), dy) for f in (linear, F.linear))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", ["x", "w", "b"])
def test_only_what_is_wanted(wanted):
    tensors = dict(zip("xwb", problem(20, 6, 5, torch.float64), strict=False))
    tensors[wanted].requires_grad_()
    grads = [torch.autograd.grad(f(*tensors.values()).sum(), tensors[wanted])[0] for f in (linear, F.linear)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("changed", ["x", "w", "b"])
def test_what_no_gradient_needs_may_change_before_backward(changed):
    """As with torch's, which alone does so for small calls of a module."""
    for wanted in ("xb", "wb", "b"):
        outcomes = []
        for function in (linear, F.linear):
            leaves = dict(zip("xwb", problem(20, 6, 5, torch.float64), strict=False))
            leaves = {name: t.requires_grad_(name in wanted) for name, t in leaves.items()}
            given = {name: t * 1 for name, t in leaves.items()}
            y = function(*given.values())
            given[changed] += 1
            try:
                y.sum().backward()
                outcomes.append([leaves[name].grad is not None for name in "xwb"])
            except RuntimeError as error:
                outcomes.append(str(error)[:40])
        assert outcomes[0] == outcomes[1], wanted


@pytest.mark.parametrize("M", [3, 20])
def test_gradcheck(M):
    inputs = [t.requires_grad_() for t in problem(M, 5, 7, torch.float64)[:3]]
    assert gradcheck(linear, inputs)
    assert gradgradcheck(linear, inputs)
    assert gradgradcheck(lambda x, w: linear(x, w, None), inputs[:2])


def test_inf_and_nan_go_where_torch_lets_them_go():
    x, w, b, _ = problem(20, 40, 33, torch.float32)
    x[3, 5], x[7, 0], w[11, 4] = torch.inf, torch.nan, -torch.inf
    torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b), equal_nan=True)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    x, w, b, dy = problem(20, 5, 7, torch.float32, bias)
    ops = torch.ops.seqkernels
    calls = [(ops.linear_fwd, (x, w, b))]
    calls += [(ops.linear_bwd, (dy, *kept)) for kept in ((x, w), (None, w), (x, None))]
    for op, arguments in calls:
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


def test_what_does_not_fit_is_told():
    x, w, b, dy = problem(20, 5, 7, torch.float32)
    fwd, bwd = torch.ops.seqkernels.linear_fwd, torch.ops.seqkernels.linear_bwd
    for call in (
        lambda: fwd(x[:, :6], w, b),
        lambda: fwd(x.double(), w, b),
        lambda: fwd(x, w, b[:4]),
        lambda: fwd(x.int(), w.int(), None),
        lambda: bwd(dy[:, :4], x, w),
        lambda: bwd(dy[:9], x, w),
        lambda: bwd(dy, x, w[:, :6]),
        lambda: bwd(dy[0], x, w),
        lambda: bwd(dy, None, None),
    ):
        with pytest.raises(RuntimeError, match=r"seqkernels::linear_.*expected"):
            call()


def test_native_ops_take_any_strides():
    x, w, b, dy = problem(20, 5, 7, torch.float32)
    for op, args in (("linear_fwd", (x, w, b)), ("linear_bwd", (dy, x, w))):
        op = getattr(torch.ops.seqkernels, op)
        torch.testing.assert_close(op(*apart(args)), op(*args), rtol=0, atol=0)


def test_no_results_from_tensors_on_two_devices():
    x, w, b, dy = problem(20, 5, 7, torch.float32)
    for op, args in (("linear_fwd", (x, w, b)), ("linear_bwd", (dy, x, w))):
        for mixed in with_one_on_meta(args):
            with pytest.raises(RuntimeError, match="expected one device for all tensors"):
                getattr(torch.ops.seqkernels, op)(*mixed)


def test_one_graph():
    x, w, b, _ = problem(20, 5, 7, torch.float32)
    w.requires_grad_()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(x, w, b).square().sum(), w)[0] for f in (compiled, linear))
    torch.testing.assert_close(ours, theirs)
