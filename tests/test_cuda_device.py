"""CUDA tensors on a device, from the module to the kernel: exactness, graphs, streams, the same bits every
time, long and large inputs. What else the kernels promise is tested in the files about ops and modules, whose
tests run `everywhere` (devices.py), and with torch's samples."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from devices import NEEDS_GPU
from tolerances import assert_as_exact, error
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from twins import KINDS, cast, chunk_by_chunk, run, run_exactly, states, twins

import seqkernels
from seqkernels import pipeline
from seqkernels.bench.gpu_recurrence import TF32_ROOM

DEVICE = "cuda"
pytestmark = list(NEEDS_GPU)
kinds = pytest.mark.parametrize("kind", KINDS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = [(1, 1, 1), (20, 3, 33), (50, 8, 128), (30, 32, 512), (12, 70, 200), (10, 16, 1024)]
# Of 4 rows in both directions, bfloat16: one block a direction, several, step by step.
FORMS = {8: "2 blocks, 1 to a group", 768: r"[0-9]{2} to a group", 4096: "forward stepwise"}
forms = pytest.mark.parametrize("H", FORMS)


def there(tensors):
    """The same on the device, leaves of their own."""
    if tensors is None:
        return None
    if isinstance(tensors, tuple) and not isinstance(tensors, PackedSequence):
        return tuple(there(t) for t in tensors)
    return cast(tensors, tensors.data.dtype).to(DEVICE)


def on_device(module, x, hx, **options):
    """`run` of a copy of the module on the device; the results are on the CPU."""
    results = run(copy.deepcopy(module).to(DEVICE), there(x), there(hx), True, **options)
    return {name: t.cpu() for name, t in results.items()}


def new(kind: str, *args, dtype: torch.dtype = torch.bfloat16, **kwargs) -> nn.Module:
    return getattr(seqkernels, kind)(*args, **kwargs, device=DEVICE, dtype=dtype)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


# ------------------------------------------------------------------------------------------------- exactness


@kinds
@dtypes
@pytest.mark.parametrize(("T", "B", "H"), SIZES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_as_exact_as_torch_on_the_cpu(kind, dtype, T, B, H, bidirectional):
    ours, theirs = twins(kind, 40, H, dtype=dtype, bidirectional=bidirectional)
    x, hx = torch.randn(T, B, 40).to(dtype), states(theirs, B)
    expected, exact = run(theirs, x, hx, True), run_exactly(theirs, x, hx, True)
    assert_as_exact(on_device(ours, x, hx), expected, exact, dtype, pooled=True)


@kinds
@dtypes
@pytest.mark.parametrize("H", [96, 768])
def test_as_exact_as_cudnn(kind, dtype, H):
    ours, theirs = twins(kind, 40, H, dtype=dtype)
    x, hx = torch.randn(20, 16, 40).to(dtype), states(theirs, 16)
    exact = run_exactly(theirs, x, hx, True)
    assert_as_exact(on_device(ours, x, hx), on_device(theirs, x, hx), exact, dtype, pooled=True)


@kinds
@pytest.mark.parametrize("H", [64, 512])
def test_tf32_where_torch_allows_it(kind, H):
    ours, theirs = twins(kind, 40, H)
    x, hx = torch.randn(20, 16, 40), states(theirs, 16)
    expected, exact = run(theirs, x, hx, True), run_exactly(theirs, x, hx, True)
    in_float32 = on_device(ours, x, hx)
    torch.set_float32_matmul_precision("high")
    try:
        in_tf32 = on_device(ours, x, hx)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_as_exact(in_tf32, expected, exact, torch.float32, pooled=True, room=TF32_ROOM)
    assert error(in_tf32["y"], exact["y"]) > 2**4 * error(in_float32["y"], exact["y"])


@kinds
@dtypes
def test_packed_sequences(kind, dtype):
    ours, theirs = twins(kind, 40, 96, 2, dtype=dtype, bidirectional=True)
    lengths = torch.randint(1, 30, (24,))
    x, hx = torch.randn(30, 24, 40).to(dtype), states(theirs, 24)
    x = pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, exact = run(theirs, x, hx, True), run_exactly(theirs, x, hx, True)
    assert_as_exact(on_device(ours, x, hx), expected, exact, dtype, pooled=True)


@kinds
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("extra", ["lengths", "lengths on the device", "resets", "recompute", "cells"])
def test_extras_as_on_the_cpu(kind, extra, training):
    module = getattr(seqkernels, kind)(40, 200, bidirectional=True).train(training)
    x, hx = torch.randn(20, 24, 40), states(module, 24)
    lengths = torch.randint(0, 21, (24,))
    lengths[0] = 0
    options = {
        "lengths": {"lengths": lengths},
        "lengths on the device": {"lengths": lengths},
        "resets": {"resets": torch.rand(20, 24) < 0.2},
        "cells": {"return_cell_states": True} if kind == "LSTM" else {},
    }.get(extra, {})
    module.recompute = extra == "recompute"
    expected = run(module, x, hx, True, **options)
    if extra in ("lengths on the device", "resets"):
        options = {name: value.to(DEVICE) for name, value in options.items()}
    assert_close(on_device(module, x, hx, **options), expected, rtol=1e-4, atol=1e-4)


@dtypes
@pytest.mark.filterwarnings("ignore:.*oneDNN")
def test_projections(dtype):
    ours, theirs = twins("LSTM", 40, 96, dtype=dtype, proj_size=24, bidirectional=True)
    x, hx = torch.randn(9, 7, 40).to(dtype), states(theirs, 7)
    expected, exact = run(theirs, x, hx, True), run_exactly(theirs, x, hx, True)
    assert_as_exact(on_device(ours, x, hx), expected, exact, dtype, pooled=True)


@kinds
def test_cells(kind):
    module = getattr(seqkernels, f"{kind}Cell")(40, 96)
    x, hx = torch.randn(7, 40), tuple(torch.randn(7, 96) for _ in range(2 if kind == "LSTM" else 1))
    results = []
    for device in ("cpu", DEVICE):
        cell = copy.deepcopy(module).to(device)
        h = tuple(h.to(device) for h in hx)
        outputs = cell(x.to(device), h if kind == "LSTM" else h[0])
        outputs = outputs if kind == "LSTM" else (outputs,)
        grads = torch.autograd.grad(sum(o.sum() for o in outputs), list(cell.parameters()))
        results.append([t.cpu() for t in (*outputs, *grads)])
    assert_close(*results, rtol=1e-5, atol=1e-5)


@kinds
def test_layouts(kind):
    """No rows, rows first, no batch, no bias, inputs that lie apart or not in order."""
    module = getattr(seqkernels, kind)(6, 9, 2, batch_first=True, bias=False)
    base, moved = torch.randn(8, 10, 12), copy.deepcopy(module).to(DEVICE)

    def views(t: Tensor) -> list[Tensor]:
        sliced = [t[:0, :, :6], t[..., :6], t[0, :, :6], t[::2, ::3, 1:7], t[..., ::2]]
        return [*sliced, t[..., :6].transpose(0, 1), t[:1, :, :6].expand(5, -1, -1)]

    for x, same in zip(views(base), views(base.to(DEVICE)), strict=True):
        expected, result = module(x)[0], moved(same)[0]
        assert_close(result.cpu(), expected)
        assert result.stride() == expected.stride()


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind, dtype):
    ours, theirs = (module.to(DEVICE) for module in twins(kind, 16, 32))
    x = randn(5, 3, 16, dtype=torch.float32)
    with torch.autocast("cuda", dtype):
        result, expected = ours(x)[0], theirs(x)[0]
    assert result.dtype == dtype  # cuDNN's may be float16 whatever is asked for
    assert_close(result, expected, rtol=0.03, atol=0.03, check_dtype=False)
    result.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@kinds
def test_swapped_and_compiled_models(kind):
    theirs = getattr(nn, kind)(16, 32, 2, bidirectional=True, device=DEVICE)
    model, x = nn.ModuleList([copy.deepcopy(theirs)]), randn(5, 3, 16, dtype=torch.float32)
    seqkernels.swap_(model)
    assert type(model[0]).__module__.startswith("seqkernels")
    expected = theirs(x)
    assert_close(model[0](x), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model[0], fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model[0], (x,)).module()
    assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
    y = compiled(x)[0]
    grads = torch.autograd.grad((y * y).sum(), list(model[0].parameters()))
    y = theirs(x)[0]
    assert_close(grads, torch.autograd.grad((y * y).sum(), list(theirs.parameters())), rtol=1e-3, atol=1e-4)


@kinds
def test_dropout_draws_on_the_device(kind):
    module, x = new(kind, 16, 32, 2, dropout=0.5), randn(5, 3, 16)
    torch.manual_seed(5)
    first, second = module(x)[0], module(x)[0]
    torch.manual_seed(5)
    assert torch.equal(module(x)[0], first)
    assert not torch.equal(second, first)


@kinds
@forms
def test_explain_says_the_plan(kind, H):
    plan = seqkernels.explain(new(kind, 64, H, bidirectional=True), randn(6, 4, 64))
    assert re.search(FORMS[H], plan), plan


# ----------------------------------------------------------------------------------------- graphs and streams


def problems(kind: str, H: int, packed: bool) -> tuple[nn.Module, list[Tensor], list[Tensor], Tensor | None]:
    """A module; three inputs and gradients of its output, the values of one place in turn; batch sizes."""
    module = new(kind, 64, H, bidirectional=True)
    sizes = torch.tensor([4, 4, 3, 1, 1, 1]) if packed else None
    leading = (int(sizes.sum()),) if packed else (6, 4)
    return module, [randn(*leading, 64) for _ in range(3)], [randn(*leading, 2 * H) for _ in range(3)], sizes


def outcome(module: nn.Module, x: Tensor, dy: Tensor, sizes: Tensor | None) -> tuple[Tensor, ...]:
    """y, and the gradients of x and the weights."""
    x = x.detach().requires_grad_()
    y, _ = module(x if sizes is None else PackedSequence(x, sizes))
    y = y if sizes is None else y.data
    return y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)


@kinds
@forms
@pytest.mark.parametrize("packed", [False, True])
def test_graphs_replay_with_new_values(kind, H, packed):
    check_graph(*problems(kind, H, packed))


def check_graph(module: nn.Module, xs: list[Tensor], dys: list[Tensor], sizes: Tensor | None) -> None:
    expected = [outcome(module, x, dy, sizes) for x, dy in zip(xs, dys, strict=True)]
    x, dy, side = xs[0].clone(), dys[0].clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        outcome(module, x, dy, sizes)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(module, x, dy, sizes)
    for i in (1, 2, 0, 1):
        for tensor in captured:
            tensor.fill_(torch.nan)
        x.copy_(xs[i])
        dy.copy_(dys[i])
        graph.replay()
        assert_close(captured, expected[i], rtol=0, atol=0)


@kinds
@forms
@pytest.mark.parametrize("packed", [False, True])
def test_work_follows_the_current_stream(kind, H, packed):
    check_stream(*problems(kind, H, packed))


def check_stream(module: nn.Module, xs: list[Tensor], dys: list[Tensor], sizes: Tensor | None) -> None:
    """A stream is busy for long and its input comes late: work elsewhere would find what was there before."""
    (x, other, _), (dy, _, _) = xs, dys
    expected, side = outcome(module, x, dy, sizes), torch.cuda.Stream()
    late = other.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(300_000_000)  # clocks
        outcome(module, late, dy, sizes)  # whatever is done once, and memory for all while none comes free
        side.synchronize()
        torch.cuda._sleep(300_000_000)
        late.copy_(x)
        result = outcome(module, late, dy, sizes)
        late.fill_(torch.nan)  # comes after all that read it
        finished = side.query()
    assert not finished, "something waited for the device"
    torch.cuda.current_stream().wait_stream(side)
    assert_close(result, expected, rtol=0, atol=0)


@kinds
def test_two_streams_at_a_time(kind):
    """Persistent kernels on two streams, each with blocks that wait for each other."""
    module, xs, dys, _ = problems(kind, 768, False)
    expected = [outcome(module, x, dy, None) for x, dy in zip(xs, dys, strict=True)]
    streams, results = [torch.cuda.Stream() for _ in xs], []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, x, dy in zip(streams, xs, dys, strict=True):
            with torch.cuda.stream(stream):
                results.append(outcome(module, x, dy, None))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert_close(result, expected[i % 3], rtol=0, atol=0)


@kinds
def test_threads_with_layers_of_different_sizes(kind):
    """They launch the same kernels with less and with more shared memory."""

    def repeated(H: int) -> bool:
        module, (x, *_), (dy, *_), _ = problems(kind, H, False)
        first = outcome(module, x, dy, None)
        return all(all(map(torch.equal, outcome(module, x, dy, None), first)) for _ in range(100))

    with ThreadPoolExecutor() as pool:
        assert all(pool.map(repeated, (64, 256, 768)))


@kinds
@forms
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_counts(kind, H):
    module, (x, *_), (dy, *_), _ = problems(kind, H, False)
    expected = outcome(module, x, dy, None)
    second = torch.device("cuda", 1)
    with torch.cuda.device(0):
        result = outcome(copy.deepcopy(module).to(second), x.to(second), dy.to(second), None)
        assert torch.cuda.current_device() == 0
    assert {t.device for t in result} == {second}
    assert_close([t.cpu() for t in result], [t.cpu() for t in expected])
    with pytest.raises(RuntimeError):
        module(x.to(second))


# ------------------------------------------------------------------------------------ layers at the same time

# Three layers of 8 rows and 700 steps, in one block or several each.
pipelined = pytest.mark.parametrize("H", [128, 256])


def deep(kind: str, H: int) -> tuple[nn.Module, list[Tensor], list[Tensor], None]:
    """As `problems`, pipelined."""
    module = new(kind, 64, H, 3)
    xs, dys = [randn(700, 8, 64) for _ in range(3)], [randn(700, 8, H) for _ in range(3)]
    assert "pipelined in 3 chunks" in seqkernels.explain(module, xs[0])
    return module, xs, dys, None


@kinds
@pipelined
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pipelined_layers_are_as_exact_as_one_after_the_other(kind, dtype, H):
    ours, theirs = twins(kind, 64, H, 3, dtype=dtype)
    x, hx = torch.randn(700, 8, 64).to(dtype), states(theirs, 8)
    result = on_device(ours, x, hx)
    with mock.patch.object(pipeline, "plan", return_value=None):
        expected = on_device(ours, x, hx)
    assert any(not torch.equal(result[name], t) for name, t in expected.items())  # sums of chunks
    assert_as_exact(result, expected, run_exactly(theirs, x, hx, True), dtype, pooled=True)


@kinds
@pipelined
def test_pipelined_layers_give_the_bits_of_chunks_in_turn(kind, H):
    """Every time. Fresh memory is filled with NaN: what is given away too early shows."""
    module, (x, *_), (dy, *_), _ = deep(kind, H)
    with chunk_by_chunk(module, 234):
        expected = outcome(module, x, dy, None)
    for _ in range(50):
        result = outcome(module, x, dy, None)
        torch.empty_like(x), torch.empty_like(dy)
        assert_close(result, expected, rtol=0, atol=0)
        with torch.no_grad():
            assert torch.equal(module(x)[0], expected[0])


@kinds
@pipelined
def test_graphs_of_pipelined_layers(kind, H):
    check_graph(*deep(kind, H))


@kinds
@pipelined
def test_pipelined_layers_follow_the_current_stream(kind, H):
    check_stream(*deep(kind, H))


@kinds
def test_pipelined_layers_on_two_streams_in_checkpoints(kind):
    module, xs, dys, _ = deep(kind, 128)
    expected = [outcome(module, x, dy, None)[1:] for x, dy in zip(xs, dys, strict=True)]
    streams, results = [torch.cuda.Stream() for _ in xs], []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, x, dy in zip(streams, xs, dys, strict=True):
            with torch.cuda.stream(stream):
                leaf = x.detach().requires_grad_()
                y = checkpoint(lambda x: module(x)[0], leaf, use_reentrant=False)
                results.append(torch.autograd.grad(y, [leaf, *module.parameters()], dy))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert_close(result, expected[i % 3], rtol=0, atol=0)


@kinds
def test_pipelined_layers_in_checkpoints_on_more_streams_than_torch_has(kind):
    """It hands out 32 in turn: one that layers and a user share must not mix two pipelines up."""
    module, (x, *_), (dy, *_), _ = deep(kind, 128)
    expected = outcome(module, x, dy, None)[1:]
    for _ in range(40):
        with torch.cuda.stream(torch.cuda.Stream()):
            leaf = x.detach().requires_grad_()
            y = checkpoint(lambda x: module(x)[0], leaf, use_reentrant=False)
            result = torch.autograd.grad(y, [leaf, *module.parameters()], dy)
        torch.cuda.synchronize()
        assert_close(result, expected, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------- many and large


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [64, 512, 2048])
def test_250_runs_give_the_same_bits(kind, dtype, H):
    module = new(kind, 64, H, bidirectional=True, dtype=dtype)
    x, dy = randn(12, 24, 64, dtype=dtype), randn(12, 24, 2 * H, dtype=dtype)
    first = outcome(module, x, dy, None)
    for _ in range(249):
        assert all(map(torch.equal, outcome(module, x, dy, None), first))


@kinds
@pytest.mark.parametrize(("dtype", "H"), [(torch.float32, 64), (torch.bfloat16, 768), (torch.float64, 33)])
def test_70000_steps(kind, dtype, H):
    """More than cuDNN can. A recurrence forgets: the last steps alone, on the CPU, give the same end."""
    T, tail = 70_000, 500
    module, x = new(kind, 16, H, dtype=dtype), randn(T, 2, 16, dtype=dtype).requires_grad_()
    y, _ = module(x)
    (dx,) = torch.autograd.grad(y[-1].sum(), x)
    assert y.isfinite().all()
    exact, short = copy.deepcopy(module).to("cpu", torch.float64), x.detach()[-tail:].cpu().double()
    end = exact(short.requires_grad_())[0]
    (dshort,) = torch.autograd.grad(end[-1].sum(), short)
    allowed = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float64: 1e-8}[dtype]
    for result, expected in ((y, end), (dx, dshort)):
        assert_close(result[-100:].cpu().double(), expected[-100:], rtol=allowed, atol=allowed)
    assert (dx[: T - 10_000] == 0).all()


LARGE = {"persistent": (70_000, 64, 512), "stepwise": (4, 2**20 + 8, 512)}


@kinds
@pytest.mark.parametrize("form", LARGE)
def test_offsets_beyond_two_billion(kind, form):
    """T * B * H > 2^31. Rows know nothing of each other: the last ones alone give the same."""
    T, B, H = LARGE[form]
    tokens = 2 * T * B * H  # bytes of one unit, row and step in bfloat16: y; gates are several times that
    needed = tokens * {"LSTM": 17, "GRU": 14, "RNN": 9}[kind]
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of memory, {free >> 30} of {total >> 30} are free")
    torch.use_deterministic_algorithms(False)  # filling fresh memory with NaN would double the time
    try:
        check_last_rows(new(kind, 64, H), T, B, form)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.cuda.empty_cache()


def check_last_rows(module: nn.Module, T: int, B: int, form: str, rows: int = 3) -> None:
    H = module.hidden_size
    with torch.no_grad():
        module.weight_ih_l0.mul_(10)  # or all states would be about the same
    x, dy = randn(T, B, 64), randn(T, B, H)
    assert form in seqkernels.explain(module, x)
    last = slice(B - rows, B)
    y, dx, *dweights = outcome(module, x, dy, None)
    assert all(grad.isfinite().all() for grad in dweights)
    kept = y[:, last].clone(), dx[:, last].clone()
    del y, dx
    alone = outcome(module, x[:, last].contiguous(), dy[:, last].contiguous(), None)[:2]
    for result, expected in zip(kept, alone, strict=True):
        assert expected.float().std() > 0.1
        assert_close(result, expected, rtol=0.05, atol=0.1)
