"""The ops of one layer and one step: against the reference, under gradcheck twice, and under opcheck."""

from functools import partial

import pytest
import torch
from devices import everywhere
from layouts import apart, with_one_on_meta
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from seqkernels.ops import gru as gru_ops
from seqkernels.ops import lstm as lstm_ops
from seqkernels.ops import rnn as rnn_ops
from seqkernels.reference import gru, lstm, rnn

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
RELU = {"nonlinearity": "relu"}
LAYERS = {
    "lstm": (partial(lstm_ops.lstm_layer, return_cells=True), lstm.lstm_layer),
    "gru": (gru_ops.gru_layer, gru.gru_layer),
    "rnn_tanh": (rnn_ops.rnn_layer, rnn.rnn_layer),
    "rnn_relu": (partial(rnn_ops.rnn_layer, **RELU), partial(rnn.rnn_layer, **RELU)),
}
CELLS = {
    "lstm": (lstm_ops.lstm_cell, lstm.lstm_cell),
    "gru": (gru_ops.gru_cell, gru.gru_cell),
    "rnn_tanh": (rnn_ops.rnn_cell, rnn.rnn_cell),
    "rnn_relu": (partial(rnn_ops.rnn_cell, **RELU), partial(rnn.rnn_cell, **RELU)),
}
new = partial(torch.randn, dtype=torch.float64, requires_grad=True)


class Problem:
    """The inputs of one layer. If packed, the last of its four rows has length zero."""

    def __init__(
        self,
        kind,
        T=4,
        B=4,
        I=3,  # noqa: E741
        H=5,
        P=0,
        bias=True,
        bidirectional=False,
        packed=False,
        resets=False,
    ) -> None:
        D, G = 2 if bidirectional else 1, GATES[kind]
        self.x = new(9, I) if packed else new(T, B, I)
        self.states = [new(D, B, P or H), *([new(D, B, H)] if kind == "lstm" else [])]
        sizes = [(G * H, I), (G * H, P or H), *[(G * H,)] * (2 * bias), *[(P, H)] * bool(P)]
        self.weights = [new(size) for _ in range(D) for size in sizes]
        self.batch_sizes = torch.tensor([3, 3, 2, 1]) if packed else None
        self.resets = torch.rand(T, B) < 0.3 if resets else None
        self.bidirectional = bidirectional

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, *self.states, *self.weights

    def call(self, layer, *inputs: Tensor) -> tuple[Tensor, ...]:
        n = 1 + len(self.states)
        options = {
            "batch_sizes": self.batch_sizes,
            "resets": self.resets,
            "bidirectional": self.bidirectional,
        }
        return layer(*inputs[:n], inputs[n:], **options)


def cell_inputs(kind: str, B: int = 3, bias: bool = True) -> list[Tensor | None]:
    I, H = 4, 5  # noqa: E741
    G = GATES[kind]
    states = [new(B, H) for _ in range(2 if kind == "lstm" else 1)]
    biases = [new(G * H), new(G * H)] if bias else [None, None]
    return [new(B, I), *states, new(G * H, I), new(G * H, H), *biases]


def with_gradients(function, inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    leaves = [t for t in inputs if t is not None]
    return outputs, torch.autograd.grad(sum((o * o).sum() for o in outputs), leaves)


kinds = pytest.mark.parametrize("kind", GATES)
SHAPES = [
    {},
    {"bidirectional": True},
    {"bias": False},
    {"packed": True},
    {"packed": True, "bidirectional": True},
    {"resets": True},
    {"resets": True, "bidirectional": True},
    {"T": 1, "B": 1, "I": 1, "H": 1},
    {"B": 0},
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(shape) or "plain")
KINDS_WITH_PROJECTION = [*((kind, 0) for kind in GATES), ("lstm", 2)]
projections = pytest.mark.parametrize(
    ("kind", "P"),
    KINDS_WITH_PROJECTION,
    ids=[k + ("_projected" if P else "") for k, P in KINDS_WITH_PROJECTION],
)


@everywhere
@projections
@shapes
def test_layer_equals_reference(kind, P, shape):
    problem = Problem(kind, **({"P": P} | shape)) if shape.get("H", 5) > P else Problem(kind, **shape)
    layer, reference = LAYERS[kind]
    expected = with_gradients(partial(problem.call, reference), problem.inputs)
    assert_close(with_gradients(partial(problem.call, layer), problem.inputs), expected)
    with torch.no_grad():
        assert_close(problem.call(layer, *problem.inputs), expected[0])
    if not kind.startswith("rnn"):
        recomputing = partial(layer, recompute=True)
        assert_close(with_gradients(partial(problem.call, recomputing), problem.inputs), expected)


@everywhere
@projections
@shapes
def test_layer_passes_gradcheck_twice(kind, P, shape):
    problem = Problem(kind, **({"T": 3, "B": 4 if "packed" in shape else 2, "I": 2, "H": 3, "P": P} | shape))
    function = partial(problem.call, LAYERS[kind][0])
    assert gradcheck(function, problem.inputs)
    assert gradgradcheck(function, problem.inputs, fast_mode=True)


@everywhere
@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("B", [0, 1, 3])
def test_cell(kind, bias, B):
    cell, reference = CELLS[kind]
    inputs = cell_inputs(kind, B=B, bias=bias)
    assert_close(with_gradients(cell, inputs), with_gradients(reference, inputs))
    with torch.no_grad():
        assert_close(cell(*inputs), reference(*inputs))
    if B:
        leaves = [t for t in inputs if t is not None]
        function = lambda *leaves: cell(*leaves, *[None] * (len(inputs) - len(leaves)))  # noqa: E731
        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves, fast_mode=True)


@everywhere
@kinds
def test_unused_outputs_need_no_gradient(kind):
    problem = Problem(kind, bidirectional=True)
    ours, reference = (partial(problem.call, layer) for layer in LAYERS[kind])
    for i in range(len(ours(*problem.inputs))):
        grads = torch.autograd.grad(ours(*problem.inputs)[i].sum(), problem.inputs)
        expected = torch.autograd.grad(
            reference(*problem.inputs)[i].sum(), problem.inputs, allow_unused=True, materialize_grads=True
        )
        assert_close(grads, expected)


@everywhere
@kinds
def test_gradients_only_where_required(kind):
    problem = Problem(kind)
    problem.x.requires_grad_(False)
    problem.states[0].requires_grad_(False)
    weights = problem.weights
    grads, expected = (
        torch.autograd.grad(problem.call(layer, *problem.inputs)[0].sum(), weights) for layer in LAYERS[kind]
    )
    assert_close(grads, expected)


@everywhere
@kinds
def test_shared_inputs_accumulate(kind):
    """One tensor as weights of both directions, and h_0 as c_0 too."""
    problem = Problem(kind, bidirectional=True)
    half = len(problem.weights) // 2
    problem.weights[half:] = problem.weights[:half]
    problem.states = [problem.states[0]] * len(problem.states)
    leaves = (problem.x, problem.states[0], *problem.weights[:half])
    first, second = [], []
    for layer in LAYERS[kind]:
        y = problem.call(layer, *problem.inputs)[0]
        grads = torch.autograd.grad((y * y).sum(), leaves, create_graph=True)
        first.append(grads)
        second.append(torch.autograd.grad(sum((g * g).sum() for g in grads), leaves))
    assert_close(*first)
    assert_close(*second)


@everywhere
@kinds
def test_torch_func_grad(kind):
    problem = Problem(kind)
    ours, reference = (lambda *inputs, f=f: problem.call(f, *inputs)[0].sin().sum() for f in LAYERS[kind])
    every = tuple(range(len(problem.inputs)))
    expected = torch.autograd.grad(reference(*problem.inputs), problem.inputs)
    assert_close(torch.func.grad(ours, every)(*problem.inputs), expected)


@pytest.mark.parametrize("grads", [1, 3])
@kinds
def test_batched_gradients(kind, grads):
    """is_grads_batched, as torch.autograd.functional.jacobian(vectorize=True) asks for it."""
    problem, inputs = Problem(kind, bidirectional=True), cell_inputs(kind)
    for function, leaves in (
        (partial(problem.call, LAYERS[kind][0]), problem.inputs),
        (CELLS[kind][0], inputs),
    ):
        output = function(*leaves)
        output = output if isinstance(output, Tensor) else output[0]
        slopes = torch.randn(grads, *output.shape, dtype=output.dtype)
        batched = torch.autograd.grad(output, leaves, slopes, is_grads_batched=True, retain_graph=True)
        single = [torch.autograd.grad(output, leaves, slope, retain_graph=True) for slope in slopes]
        assert_close(batched, tuple(torch.stack(g) for g in zip(*single, strict=True)))


def native_calls(kind: str, shape: dict, dtype: torch.dtype):
    """(op, args) of forward and backward of a layer, as the autograd.Function makes them."""
    problem = Problem(kind, **shape)
    x, *rest = (t.detach().to(dtype) for t in problem.inputs)
    states, weights = rest[: len(problem.states)], rest[len(problem.states) :]
    layout = (problem.batch_sizes, problem.resets)
    name = kind.partition("_")[0]
    forward = getattr(torch.ops.seqkernels, f"{name}_layer_fwd").default
    backward = getattr(torch.ops.seqkernels, f"{name}_layer_bwd").default
    relu = (kind == "rnn_relu",) if name == "rnn" else ()
    saves = {"lstm": (True, True), "gru": (True,), "rnn": relu}[name]
    forward_args = (x, *states, weights, *layout, None, problem.bidirectional, *saves)
    yield forward, forward_args
    if name != "rnn":
        yield forward, (*forward_args[: -len(saves)], *[False] * len(saves))
    outputs = forward(*forward_args)
    if name == "lstm":
        saved, grads = (outputs[0], outputs[3], outputs[4]), outputs[:4]
    else:
        saved, grads = (outputs[0], *outputs[2:]), outputs[:2]
    grads = [torch.ones_like(g) for g in grads]
    for need_dx in (True, False):
        yield backward, (*grads, x, *states, weights, *saved, *layout, problem.bidirectional, *relu, need_dx)
        grads = [None, *grads[1:]]


@kinds
@shapes
def test_opcheck_layer(kind, shape):
    for dtype in (torch.float32, torch.bfloat16) if shape.get("packed") else (torch.float32,):
        for op, args in native_calls(kind, shape, dtype):
            assert set(opcheck(op, args).values()) == {"SUCCESS"}


@kinds
def test_opcheck_cell(kind):
    name = kind.partition("_")[0]
    op = getattr(torch.ops.seqkernels, f"{name}_cell_fwd").default
    for bias in (True, False):
        inputs = [t if t is None else t.detach() for t in cell_inputs(kind, bias=bias)]
        for flag in (True, False):
            assert set(opcheck(op, (*inputs, flag)).values()) == {"SUCCESS"}


@kinds
def test_opcheck_pack(kind):
    weights = [w.detach() for w in Problem(kind, bidirectional=True).weights]
    result = opcheck(torch.ops.seqkernels.pack_weights.default, (weights, GATES[kind], True))
    assert set(result.values()) == {"SUCCESS"}


@kinds
@shapes
def test_native_ops_take_any_strides(kind, shape):
    for op, args in native_calls(kind, shape, torch.float32):
        assert_close(op(*apart(args)), op(*args), rtol=0, atol=0)


@kinds
def test_native_cells_and_packs_take_any_strides(kind):
    op = getattr(torch.ops.seqkernels, f"{kind.partition('_')[0]}_cell_fwd")
    for bias in (True, False):
        inputs = [t if t is None else t.detach() for t in cell_inputs(kind, bias=bias)]
        assert_close(op(*apart(inputs), False), op(*inputs, False), rtol=0, atol=0)
    weights, pack = [w.detach() for w in Problem(kind).weights], torch.ops.seqkernels.pack_weights
    assert torch.equal(pack(apart(weights), GATES[kind], False), pack(weights, GATES[kind], False))


@everywhere
@kinds
@shapes
def test_saved_tensors_that_come_back_with_other_strides(kind, shape):
    problem, inputs = Problem(kind, **shape), cell_inputs(kind)
    for function, leaves in (
        (partial(problem.call, LAYERS[kind][0]), problem.inputs),
        (CELLS[kind][0], inputs),
    ):
        expected = with_gradients(function, leaves)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, apart):
            assert_close(with_gradients(function, leaves), expected)


@kinds
@shapes
def test_no_results_from_tensors_on_two_devices(kind, shape):
    """Of tensors without data, which torch takes to the functions that know shapes only."""
    for op, args in native_calls(kind, shape, torch.float32):
        for mixed in with_one_on_meta(args):
            with pytest.raises(RuntimeError, match="expected one device for all tensors"):
                op(*mixed)


@kinds
def test_no_results_of_cells_and_packs_from_tensors_on_two_devices(kind):
    ops = torch.ops.seqkernels
    inputs = [t.detach() for t in cell_inputs(kind)]
    weights = [w.detach() for w in Problem(kind).weights]
    panels = ops.pack_weights(weights, GATES[kind], False)
    op, args = next(native_calls(kind, {}, torch.float64))
    at = next(i for i, argument in enumerate(op._schema.arguments) if argument.name == "panels")
    calls = (
        (getattr(ops, f"{kind.partition('_')[0]}_cell_fwd"), (*inputs, False)),
        (ops.pack_weights, (weights, GATES[kind], False)),
        (op, (*args[:at], panels, *args[at + 1 :])),
    )
    for op, args in calls:
        for mixed in with_one_on_meta(args):
            with pytest.raises(RuntimeError, match="expected one device for all tensors"):
                op(*mixed)
