"""Layers at the same time on streams, without a GPU: streams that only note who waits for whom, and emulated
kernels. What needs a device is in test_cuda_device.py."""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cuda_emulation import emulated_gpu, load
from devices import other_ops
from tolerances import assert_as_exact
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from twins import KINDS, chunk_by_chunk, run, run_exactly, states, twins

import seqkernels
from seqkernels import pipeline, support

kinds = pytest.mark.parametrize("kind", KINDS)


class Stream:
    """Knows which work comes before all that it is given from now on."""

    def __init__(self, gpu: "Gpu", device: torch.device) -> None:
        self.gpu, self.device, self.before = gpu, device, set()

    def record_event(self) -> frozenset:
        return frozenset(self.before)

    def wait_event(self, event: frozenset) -> None:
        self.gpu.waits += 1
        if self.gpu.waits != self.gpu.deaf_to:
            self.before |= event

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Gpu(TorchDispatchMode):
    """Stands in for torch.cuda and looks at every op of torch and ours: what it reads must have been written
    before, and memory that another stream uses than that which allocated it must be recorded there.

    deaf_to: the number of a wait that is forgotten; forgetful_of: the number of a recorded use; pool: so many
    streams are handed out in turn.
    """

    def __init__(
        self, multiprocessors: int = 24, deaf_to: int = 0, forgetful_of: int = 0, pool: int = 1000
    ) -> None:
        super().__init__()
        self.pool = cycle([Stream(self, torch.device("cpu")) for _ in range(pool)])
        self.multiprocessors, self.deaf_to, self.forgetful_of = multiprocessors, deaf_to, forgetful_of
        self.current = self.main = Stream(self, torch.device("cpu"))
        self.waits, self.work, self.alive = 0, 0, []
        self.main.before.add(0)  # what was there before the call
        self.written: dict[int, tuple[int, Stream]] = {}
        self.uses: dict[tuple[int, Stream], bool] = {}
        self.recorded: dict[tuple[int, Stream], None] = {}
        self.streams: dict[Stream, int] = defaultdict(int)

    def Stream(self, device: torch.device) -> Stream:
        return next(self.pool)

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=self.multiprocessors)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def record(self, tensor: Tensor, stream: Stream) -> None:
        self.recorded.setdefault((memory_of(tensor), stream))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read, given = (
            [t for t in pytree.tree_leaves(v) if isinstance(t, Tensor) and t.numel()]
            for v in ((args, kwargs), result)
        )
        self.alive += read + given  # or memory would have the address of what was freed
        self.work += 1
        for memory in map(memory_of, read):
            writer, _ = self.written.setdefault(memory, (0, self.main))
            assert writer in self.current.before, f"{func} reads what may not be there yet"
            self.uses[memory, self.current] = True
        for memory in map(memory_of, given):
            self.written.setdefault(memory, (self.work, self.current))
        self.current.before.add(self.work)
        self.streams[self.current] += 1
        return result

    def check(self) -> None:
        recorded = [use for n, use in enumerate(self.recorded, 1) if n != self.forgetful_of]
        for memory, stream in self.uses:
            owner = self.written[memory][1]
            assert stream is owner or (memory, stream) in recorded, "memory may be given away too early"
        assert self.main.before == set(range(self.work + 1)), "the current stream has not waited for all"


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def pipelined(gpu: Gpu, steps_per_layer: int = 2) -> Iterator[None]:
    """Layers on CPU tensors are pipelined as on a GPU of so many multiprocessors, and run on its kernels."""
    patch = mock.patch.object
    load()
    emulated = torch.ops.seqkernels_emulated
    with (
        patch(pipeline, "cuda", gpu),
        patch(pipeline, "_families", {}),
        patch(pipeline, "_drawn", set()),
        patch(pipeline, "STEPS_PER_LAYER", steps_per_layer),
        patch(pipeline, "cuda_plan", emulated.cuda_plan.default),
        patch(pipeline, "cuda_blocks", emulated.cuda_blocks.default),
        patch(support, "on_gpu", lambda x: True),
        patch(Tensor, "record_stream", lambda tensor, stream: gpu.record(tensor, stream)),
        emulated_gpu(gpu.multiprocessors),
    ):
        yield


def on_cpu_kernels():
    """In place of the emulated ones, which nothing can trace."""
    return other_ops(lambda op: getattr(torch.ops.seqkernels, op._opname).default)


@contextmanager
def planned() -> Iterator[list[pipeline.Plan | None]]:
    """The plan of every call."""
    plans, plan = [], pipeline.plan
    with mock.patch.object(pipeline, "plan", lambda *args: plans.append(plan(*args)) or plans[-1]):
        yield plans


# ---------------------------------------------------------------------------------- who waits for whom


def watched(kind: str, layers: int, streams: int, gradients: bool, **forgets: int) -> Gpu:
    module = getattr(seqkernels, kind)(5, 8, layers, dropout=0.1)
    module.recompute = kind == "GRU"
    x, hx = torch.randn(4 * layers + 3, 3, 5), states(module, 3)
    options = {"return_cell_states": True} if kind == "LSTM" else {}
    gpu = Gpu(streams, **forgets)
    with pipelined(gpu), planned() as plans, torch.set_grad_enabled(gradients), gpu:
        module(x, hx if kind == "LSTM" else hx[0], **options)
    assert plans == [pipeline.Plan((4 * layers + 4) // 2, 2, streams)]
    gpu.check()
    return gpu


watching = pytest.mark.parametrize(
    ("kind", "layers", "streams"), [("LSTM", 2, 2), ("GRU", 3, 3), ("RNN", 3, 2), ("LSTM", 4, 3)]
)


@watching
@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_is_read_or_given_away_too_early(kind, layers, streams, gradients):
    gpu = watched(kind, layers, streams, gradients)
    assert len(gpu.streams) == 1 + streams
    assert min(gpu.streams.values()) > 1


@watching
def test_every_wait_and_every_record_is_needed(kind, layers, streams):
    gpu = watched(kind, layers, streams, True)
    assert gpu.waits == 1 + (layers - 1) * 2 + 1
    for n in range(1, gpu.waits + 1):
        with pytest.raises(AssertionError, match=r"not be there yet|has not waited"):
            watched(kind, layers, streams, True, deaf_to=n)
    for n in range(1, len(gpu.recorded) + 1):
        with pytest.raises(AssertionError, match="given away too early"):
            watched(kind, layers, streams, True, forgetful_of=n)


@kinds
def test_gradients_leave_by_nodes_of_the_current_stream(kind):
    """Autograd records them where the node runs that takes them: of leaves used on another stream, there."""
    module, x = getattr(seqkernels, kind)(5, 8, 3), torch.randn(24, 3, 5, requires_grad=True)
    hx = [h.requires_grad_() for h in states(module, 3)]
    with pipelined(Gpu()):
        y, _ = module(x, hx if kind == "LSTM" else hx[0])
    todo, takers = [y.grad_fn], {}
    while todo:
        node = todo.pop()
        for taker, _ in node.next_functions:
            if taker is not None and taker not in takers:
                todo.append(taker)
                takers[taker] = node.name()
    leaves = [giver for taker, giver in takers.items() if "AccumulateGrad" in taker.name()]
    assert len(leaves) == 1 + len(hx) + len(list(module.parameters()))
    assert {re.sub("Backward.*", "", giver) for giver in leaves} == {"Split", "Slice", "View"}


def test_the_host_issues_work_as_it_becomes_ready():
    """Not a layer at a time: the last would start when the first has ended."""
    issued = []

    def layer(i, x, states, weights):
        issued.append((i, int(x[0, 0, 0])))
        return x, *states

    x, state = torch.arange(3.0).view(3, 1, 1), torch.zeros(1)
    with pipelined(Gpu()):
        pipeline.run(layer, pipeline.Plan(1, 3, 2), x, [[state]] * 3, [[state]] * 3)
    assert issued == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0), (1, 2), (2, 1), (2, 2)]


def test_streams_are_those_of_the_current_stream():
    gpu = Gpu()
    with pipelined(gpu):
        a, b = gpu.main, gpu.Stream(gpu.main.device)
        of_a, of_b = pipeline._streams_beside(a, 2), pipeline._streams_beside(b, 3)
        assert len({a, b, *of_a, *of_b}) == 7
        assert pipeline._streams_beside(a, 3)[:2] == of_a
        assert pipeline._streams_beside(of_b[1], 3) == of_b


def test_no_stream_is_of_two_families():
    """Or a checkpoint on it might compute on the other one's streams, which backward does not wait for."""
    gpu = Gpu(pool=8)
    with pipelined(gpu):
        a, b, c, d = gpu.main, *(gpu.Stream(gpu.main.device) for _ in range(3))
        of_a, of_b, of_c, of_d = (pipeline._streams_beside(user, 3) for user in (a, b, c, d))
        assert (len(of_a), len(of_b)) == (3, 3)
        assert not {a, *of_a} & {b, *of_b}
        assert c in of_b, "torch had nothing else left"
        assert of_c == of_b
        assert of_d == [d]
        before = next(gpu.pool)
        assert pipeline._streams_beside(d, 3) == [d]
        assert [next(gpu.pool) for _ in range(8)][-1] is before, "nothing is drawn where there is nothing"
        for user, family in ((a, of_a), (b, of_b), (d, of_d)):
            assert all(pipeline._streams_beside(stream, 3) == family for stream in (user, *family))


# --------------------------------------------------------------------------------------------- numbers


@kinds
@pytest.mark.parametrize(("layers", "T", "H"), [(2, 8, 8), (2, 37, 40), (3, 50, 7), (4, 23, 9)], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["states", "no states"])
def test_the_same_numbers(kind, layers, T, H, given):
    """Bit by bit those of chunks one after the other, and as exact as torch's of the whole."""
    ours, theirs = twins(kind, 5, H, layers)
    x, hx = torch.randn(T, 3, 5), states(theirs, 3) if given else None
    with pipelined(Gpu()), planned() as plans:
        result, inference = run(ours, x, hx, True), run(ours, x, hx)
    assert all(plans)
    with emulated_gpu(Gpu().multiprocessors), chunk_by_chunk(ours, plans[0].steps):
        expected = run(ours, x, hx, True)
    for name, t in expected.items():
        assert torch.equal(result[name], t), name
        assert name.startswith("grad") or torch.equal(inference[name], t), name
    exact = run_exactly(theirs, x, hx, True)
    assert_as_exact(result, run(theirs, x, hx, True), exact, torch.float32, pooled=True)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_as_exact_as_torch(kind, dtype):
    """At the border of a chunk c and gradients of states are rounded to the type; here every four steps."""
    ours, theirs = twins(kind, 5, 24, 2, dtype=dtype)
    x, hx = torch.randn(64, 3, 5).to(dtype), states(theirs, 3)
    with pipelined(Gpu()), planned() as plans:
        result = run(ours, x, hx, True)
    assert plans == [pipeline.Plan(4, 16, 2)]
    assert_as_exact(result, run(theirs, x, hx, True), run_exactly(theirs, x, hx, True), dtype, pooled=True)


def test_cells_rows_first_recompute_and_prepacked():
    module = seqkernels.LSTM(5, 8, 2, batch_first=True)
    x, hx = torch.randn(3, 21, 5), states(module, 3)
    expected = run(module, x, hx, True, return_cell_states=True)
    module.recompute = True
    with pipelined(Gpu()), planned() as plans:
        torch.testing.assert_close(run(module, x, hx, True, return_cell_states=True), expected)
        module.prepack_()
        torch.testing.assert_close(module(x, hx)[0], expected["y"])
    assert all(plans)
    assert len(plans) == 2


def test_autocast_checkpoint_and_gradients_of_gradients():
    module, x = seqkernels.GRU(5, 8, 2), torch.randn(17, 3, 5, requires_grad=True)
    expected = torch.autograd.grad(module(x)[0].square().sum(), [x, *module.parameters()], create_graph=True)
    twice = torch.autograd.grad(expected[0].square().sum(), list(module.parameters()))
    with pipelined(Gpu()), planned() as plans:
        y = checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
        result = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        torch.testing.assert_close(result, expected)
        first = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)[0]
        torch.testing.assert_close(
            torch.autograd.grad(first.square().sum(), list(module.parameters())), twice
        )
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(y, module(x)[0], rtol=0.02, atol=0.02)
    assert all(plans)
    assert len(plans) == 4  # the checkpoint's twice


# -------------------------------------------------------------------------------------------- decisions


def decision(
    gpu: int = 24, T: int = 64, layers: int = 2, hx=None, grad: bool = True, kind: str = "GRU", **options
):
    call = {name: options.pop(name) for name in ("lengths", "resets") if name in options}
    module = getattr(seqkernels, kind)(5, 8, layers, **options)
    with pipelined(Gpu(gpu), 16), planned() as plans, torch.set_grad_enabled(grad):
        module(torch.randn(T, 3, 5, dtype=options.get("dtype")), **call)
    return plans[-1] if plans else None  # one layer takes the short cut, where nobody asks


def test_who_is_pipelined():
    assert decision() == pipeline.Plan(32, 2, 2)
    assert decision(T=95) == pipeline.Plan(48, 2, 2)
    assert decision(T=96) == pipeline.Plan(32, 3, 2)
    assert decision(T=16 * 32) == decision(T=16 * 32, kind="LSTM") == pipeline.Plan(32, 16, 2)
    assert decision(T=1000) == pipeline.Plan(63, 16, 2)  # no more than 16 chunks
    assert decision(T=96, layers=3) == pipeline.Plan(48, 2, 3)  # longer ones where there are more layers
    assert decision(T=96, layers=3, gpu=2) == pipeline.Plan(48, 2, 2)  # layers share streams


def test_who_is_not():
    assert decision(T=63) is None
    assert decision(layers=1) is None
    assert decision(gpu=1) is None
    assert decision(gpu=0) is None
    assert decision(bidirectional=True) is None
    assert decision(dtype=torch.float64) is None
    assert decision(kind="LSTM", proj_size=3) is None
    assert decision(lengths=torch.tensor([64, 3, 5])) is None
    assert decision(resets=torch.zeros(64, 3, dtype=torch.bool)) is None


def test_with_gradients_both_ways_have_to_fit():
    x, sizes = torch.empty(0, dtype=torch.bfloat16), (4, 4096, 16, 512, 2)
    for multiprocessors, forward, training in ((120, None, None), (132, 2, 2)):
        with pipelined(Gpu(multiprocessors)):
            plans = [pipeline.fit(x, *sizes, gradients) for gradients in (False, True)]
        assert [p and p.streams for p in plans] == [forward, training]
    for backward, streams in {0: None, 40: 2, 64: None}.items():
        with (
            pipelined(Gpu(100)),
            mock.patch.object(pipeline, "cuda_blocks", lambda *_, backward=backward: (10, backward)),
        ):
            assert pipeline.fit(x, *sizes, False).streams == 2
            plan = pipeline.fit(x, *sizes, True)
        assert (plan and plan.streams) == streams


def test_who_looks_on():
    module, x = seqkernels.GRU(5, 8, 2).requires_grad_(False), torch.randn(64, 3, 5)
    expected = module(x)[0]
    with pipelined(Gpu()), on_cpu_kernels(), planned() as plans:
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], expected)
        torch.export.export(module, (x,))
        torch.func.grad(lambda x: module(x)[0].sum())(x)
        assert len(plans) >= 3
        packed = pack_sequence([x[:, 0], x[:, 1]])
        module(packed)
        assert not any(plans)
        module(x)
        assert plans[-1]


def test_explain():
    def explain(*args, gpu=24, **options) -> str:
        module = seqkernels.GRU(5, 8, 2, batch_first=True, **options)
        with pipelined(Gpu(gpu), 16):
            return seqkernels.explain(module, *args).partition("rows")[2]

    x = torch.randn(3, 64, 5)
    assert explain(x).endswith("a warp, pipelined in 2 chunks on 2 streams")
    assert explain(x, gpu=1).endswith("a warp, one layer after the other")
    packed = pack_sequence([*x])
    assert "pipelined" not in explain(x, bidirectional=True) + explain() + explain(packed)
    assert explain(packed) == explain(x).partition(", pipelined")[0]  # of as many rows
