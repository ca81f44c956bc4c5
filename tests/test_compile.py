"""torch.compile without graph breaks, torch.export with dynamic sizes."""

import copy
from contextlib import nullcontext

import pytest
import torch
from layouts import apart
from torch import nn
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from twins import KINDS

import seqkernels

CELLS = ("LSTMCell", "GRUCell", "RNNCell")
kinds = pytest.mark.parametrize("kind", KINDS)
cells = pytest.mark.parametrize("kind", CELLS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def in_one_graph(function):
    """Compiled by all of torch.compile but Inductor, which is slow and adds nothing here."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def results(module: nn.Module, *args, **kwargs):
    """All outputs, and the gradients of inputs and parameters."""
    outputs = tree_leaves(module(*args, **kwargs))
    leaves = [t for t in tree_leaves(args) if t.requires_grad] + list(module.parameters())
    return outputs, torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves)


OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "without bias": {"bias": False},
}


def test_graphs_ask_nothing_that_torch_2_11_cannot_compile(monkeypatch):
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch._dynamo.disable(lambda device: True))
    module, x, q = seqkernels.GRU(3, 4), torch.randn(5, 2, 3), torch.randn(2, 2, 5, 8)
    assert_close(in_one_graph(lambda: module(x))(), nn.GRU.forward(module, x))
    attend = seqkernels.scaled_dot_product_attention
    assert_close(in_one_graph(lambda: attend(q, q, q))(), F.scaled_dot_product_attention(q, q, q))


@kinds
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_train_in_one_graph(kind, options):
    module = getattr(seqkernels, kind)(5, 7, **options)
    compiled = in_one_graph(module)
    for shape in ((4, 3, 5), (6, 2, 5), (9, 8, 5)):
        x = torch.randn(shape, requires_grad=True)
        assert_close(results(compiled, x), results(module, x))
        with torch.no_grad():
            assert_close(compiled(x), module(x))


@kinds
def test_states_recompute_and_resets_in_one_graph(kind):
    module = getattr(seqkernels, kind)(5, 7)
    module.recompute = True
    compiled, x, h = in_one_graph(module), torch.randn(4, 3, 5), torch.randn(1, 3, 7, requires_grad=True)
    hx = (h, torch.randn(1, 3, 7)) if kind == "LSTM" else h
    resets = torch.rand(4, 3) < 0.4
    extras = {"resets": resets} | ({"return_cell_states": True} if kind == "LSTM" else {})
    assert_close(results(compiled, x, hx, **extras), results(module, x, hx, **extras))
    unbatched = torch.randn(4, 5)
    assert_close(results(compiled, unbatched), results(module, unbatched))


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_one_tensor_for_both_states_in_one_graph(kind):
    module, x = getattr(seqkernels, kind)(5, 7), torch.randn(*((4,) if kind == "LSTM" else ()), 3, 5)
    h = torch.randn(*((1,) if kind == "LSTM" else ()), 3, 7, requires_grad=True)
    assert_close(results(in_one_graph(module), x, (h, h)), results(module, x, (h, h)))


@kinds
def test_autocast_in_one_graph(kind):
    module, x = getattr(seqkernels, kind)(5, 7), torch.randn(4, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(in_one_graph(module)(x), module(x))


@kinds
def test_dropout_in_one_graph(kind):
    module, x = getattr(seqkernels, kind)(5, 7, 2, dropout=0.5), torch.randn(4, 3, 5)
    compiled = in_one_graph(module)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    module.eval()
    assert_close(compiled(x), module(x))


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:seqkernels falls back")
def test_torch_func_grad_in_one_graph(kind, frozen):
    """Dynamo forgets that the argument itself wants a gradient."""
    module = getattr(seqkernels, kind)(5, 7).requires_grad_(not frozen)
    x = torch.randn(*((3, 5) if kind in CELLS else (4, 3, 5)))
    gradient = torch.func.grad(lambda x: tree_leaves(module(x))[0].sin().sum())
    assert_close(in_one_graph(gradient)(x), gradient(x))


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
@pytest.mark.filterwarnings("ignore:seqkernels falls back")
def test_torch_func_grad_of_weights_compiles(kind):
    """With breaks at layers, as torch's own have them; compiled torch's loops raise."""
    module = getattr(seqkernels, kind)(5, 7)
    weights = {name: w.detach() for name, w in module.named_parameters()}
    x = torch.randn(*((3, 5) if kind in CELLS else (4, 3, 5)))
    loss = lambda weights: tree_leaves(torch.func.functional_call(module, weights, (x,)))[0].sin().sum()  # noqa: E731
    gradient = torch.func.grad(loss)
    assert_close(torch.compile(gradient, backend="aot_eager")(weights), gradient(weights))


@pytest.mark.parametrize("kind", ["GRU", "RNN", *CELLS])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:seqkernels falls back")
def test_forward_mode_derivatives_in_one_graph(kind, frozen):
    module = getattr(seqkernels, kind)(5, 7).requires_grad_(not frozen)
    x = torch.randn(*((3, 5) if kind in CELLS else (4, 3, 5)))

    def derivative(x, direction):
        return torch.func.jvp(lambda x: tree_leaves(module(x))[0], (x,), (direction,))

    direction = torch.randn_like(x)
    assert_close(in_one_graph(derivative)(x, direction), derivative(x, direction))


def calls(name):
    """A function of x, and its parameters."""
    if name in (*KINDS, *CELLS):
        module = getattr(seqkernels, name)(5, 7).double()
        return lambda x: tree_leaves(module(x))[0], list(module.parameters())
    if name == "MultiheadAttention":
        module = seqkernels.MultiheadAttention(5, 1).double()
        return lambda x: module(x, x, x)[0], list(module.parameters())
    v = torch.randn(5).double()
    if name == "attention":
        return lambda x: seqkernels.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]), []
    return lambda x: seqkernels.additive_attention(x, x, x, v), []


@pytest.mark.parametrize(
    "name", ["LSTM", "RNN", "GRUCell", "MultiheadAttention", "attention", "additive attention"]
)
@pytest.mark.filterwarnings("ignore:seqkernels falls back")
def test_second_derivatives_by_torch_func_in_one_graph(name):
    """The gradient of a gradient, and of a penalty made of one, for x and for parameters."""
    call, parameters = calls(name)
    x = torch.randn(*((3, 5) if name in CELLS else (3, 4, 5))).double()
    loss = lambda x: call(x).sin().sum()  # noqa: E731
    steepness = lambda x: torch.func.grad(loss)(x).square().sum()  # noqa: E731
    assert_close(in_one_graph(torch.func.grad(steepness))(x), torch.func.grad(steepness)(x))

    leaves = [x.clone().requires_grad_(), *parameters]
    penalty = lambda x: loss(x) + steepness(x)  # noqa: E731
    results = (torch.autograd.grad(f(leaves[0]), leaves) for f in (in_one_graph(penalty), penalty))
    assert_close(*results)


@pytest.mark.filterwarnings("ignore:seqkernels falls back")
def test_torch_func_grad_of_attention_in_one_graph():
    attend = seqkernels.scaled_dot_product_attention
    gradient, x = torch.func.grad(lambda x: attend(x, x, x).sin().sum()), torch.randn(2, 3, 4, 5)
    assert_close(in_one_graph(gradient)(x), gradient(x))


@cells
def test_cells_train_in_one_graph(kind):
    module = getattr(seqkernels, kind)(5, 7)
    compiled, h = in_one_graph(module), torch.randn(3, 7, requires_grad=True)
    hx = (h, h) if kind == "LSTMCell" else h  # one tensor twice is what dynamo does not like
    for args in ((torch.randn(3, 5, requires_grad=True),), (torch.randn(3, 5), hx), (torch.randn(5),)):
        assert_close(results(compiled, *args), results(module, *args))
        with torch.no_grad():
            assert_close(compiled(*args), module(*args))


@cells
def test_a_loop_over_a_cell_in_one_graph(kind):
    module, xs = getattr(seqkernels, kind)(5, 7), torch.randn(4, 3, 5)

    def loop(xs):
        state = None
        for x in xs:
            state = module(x, state)
        return state

    assert_close(in_one_graph(loop)(xs), loop(xs))


@kinds
def test_a_compiled_model_with_inductor(kind):
    model = nn.Sequential(nn.Linear(5, 6), getattr(seqkernels, kind)(6, 7))
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(4, 3, 5, requires_grad=True)
    assert_close(results(compiled, x), results(model, x))


@kinds
def test_a_swapped_model_compiles_in_one_graph(kind):
    model, x = nn.ModuleList([getattr(nn, kind)(5, 7)]), torch.randn(4, 3, 5)
    seqkernels.swap_(model)
    assert_close(in_one_graph(model[0])(x), model[0](x))


@kinds
def test_lengths_in_one_graph(kind):
    module, x = getattr(seqkernels, kind)(5, 7, bidirectional=True), torch.randn(4, 3, 5, requires_grad=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = in_one_graph(module)
        for lengths in ([4, 0, 2], [1, 1, 3], [4, 4, 4]):
            lengths = torch.tensor(lengths)
            assert_close(results(compiled, x, lengths=lengths), results(module, x, lengths=lengths))
        for lengths in ([-1, 2, 3], [5, 2, 1]):
            with pytest.raises(RuntimeError, match="lengths must lie between 0 and T"):
                compiled(x, lengths=torch.tensor(lengths))


@kinds
def test_packed_sequences_and_lengths_compile_with_breaks(kind):
    module, x, lengths = getattr(seqkernels, kind)(5, 7), torch.randn(4, 3, 5), torch.tensor([4, 3, 1])
    packed = pack_padded_sequence(x, lengths)
    compiled = torch.compile(
        lambda packed, x: (module(packed)[0].data, module(x, lengths=lengths)), backend="eager"
    )
    assert_close(compiled(packed, x), (module(packed)[0].data, module(x, lengths=lengths)))


@kinds
@pytest.mark.parametrize("batch_first", [False, True])
def test_export_with_dynamic_sizes(kind, batch_first):
    module = getattr(seqkernels, kind)(5, 7, 2, bidirectional=True, batch_first=batch_first)
    program = export(module, (torch.randn(4, 3, 5),), dynamic_shapes=({0: Dim("first"), 1: Dim("second")},))
    assert any("seqkernels" in str(node.target) for node in program.graph.nodes)
    assert program.state_dict.keys() == module.state_dict().keys()
    assert not program.constants
    for shape in ((9, 2, 5), (2, 11, 5)):
        x = torch.randn(shape)
        assert_close(program.module()(x), module(x))


@cells
def test_export_of_cells_with_dynamic_batch(kind):
    module = getattr(seqkernels, kind)(5, 7)
    program = export(module, (torch.randn(3, 5),), dynamic_shapes=({0: Dim("batch")},))
    x = torch.randn(8, 5)
    assert_close(program.module()(x), module(x))


class WithLengths(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, lengths):
        return self.inner(x, lengths=lengths)


@kinds
def test_export_with_lengths(kind):
    module = WithLengths(getattr(seqkernels, kind)(5, 7))
    time, rows = Dim("time"), Dim("rows")
    program = export(
        module,
        (torch.randn(4, 3, 5), torch.tensor([4, 0, 2])),
        dynamic_shapes={"x": {0: time, 1: rows}, "lengths": {0: rows}},
    )
    for T, lengths in ((4, [1, 3, 4]), (4, [4, 4, 4]), (7, [2, 0, 7, 1, 5])):
        x, lengths = torch.randn(T, len(lengths), 5), torch.tensor(lengths)
        assert_close(program.module()(x, lengths), module(x, lengths))
    with pytest.raises(RuntimeError, match="lengths must lie between 0 and T"):
        program.module()(torch.randn(4, 2, 5), torch.tensor([5, 1]))


def assert_trains_alike(program: torch.export.ExportedProgram, module: nn.Module, *args) -> None:
    """The program has the module's results and gradients."""
    ours, expected = program.module(), module
    for prepare in (ours, expected):
        prepare.zero_grad()
    x, *rest = args
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [tree_leaves(f(i, *rest)) for f, i in zip((ours, expected), inputs, strict=True)]
    for o in outputs:
        sum(t.sin().sum() for t in o).backward()
    assert_close(*outputs)
    assert_close(*(i.grad for i in inputs))
    grads = {n: p.grad for n, p in ours.named_parameters()}
    assert_close(grads, {n: p.grad for n, p in expected.named_parameters()})


class Between(nn.Module):
    """Something to train before and behind, as gradients have to pass."""

    def __init__(self, inner: nn.Module, **options) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 5), inner, nn.Linear(7, 3)
        self.options = options

    def forward(self, x):
        out = self.inner(self.first(x), **self.options)
        return self.last(out if isinstance(out, torch.Tensor) else out[0])


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_train(kind, strict, tmp_path):
    module = Between(getattr(seqkernels, kind)(5, 7))
    shape = (3, 5) if kind in CELLS else (4, 3, 5)
    program = export(module, (torch.randn(shape),), strict=strict)
    assert_trains_alike(program, module, torch.randn(shape))
    assert_trains_alike(program.run_decompositions(), module, torch.randn(shape))
    torch.export.save(program, tmp_path / "program.pt2")
    assert_trains_alike(torch.export.load(tmp_path / "program.pt2"), module, torch.randn(shape))


@kinds
def test_programs_exported_without_gradients_train(kind):
    module = Between(getattr(seqkernels, kind)(5, 7, 2, bidirectional=True), resets=torch.rand(4, 3) < 0.3)
    module.last = nn.Linear(14, 3)
    with torch.no_grad():
        program = export(module, (torch.randn(4, 3, 5),))
    assert f"seqkernels.{kind.lower()}_layer_fwd.default" not in str(program.graph)
    assert_trains_alike(program, module, torch.randn(4, 3, 5))
    with torch.no_grad():
        x = torch.randn(4, 3, 5)
        assert_close(program.module()(x), module(x))


class Attends(nn.Module):
    """To itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        sizes = (8, 2) if kind == "MultiheadAttention" else (8, 8, 6)
        self.inner = getattr(seqkernels, kind)(*sizes)

    def forward(self, x):
        return self.inner(x, x, x)


def example(kind: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A module that calls ops of ours, and its arguments."""
    if kind.endswith("Attention"):
        return Attends(kind), (torch.randn(4, 3, 8),)
    layer = kind in KINDS
    module, lead = getattr(seqkernels, kind)(5, 7), (1,) if layer else ()
    hx = [torch.randn(*lead, 3, 7) for _ in range(2 if kind.startswith("LSTM") else 1)]
    return module, (torch.randn(*((4,) if layer else ()), 3, 5), hx[0] if len(hx) == 1 else tuple(hx))


exported_kinds = pytest.mark.parametrize("kind", [*KINDS, *CELLS, "MultiheadAttention", "AdditiveAttention"])
modes = pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])


@exported_kinds
@modes
def test_exported_programs_take_any_strides(kind, mode):
    module, args = example(kind)
    program = export(module, args).module()
    weights = {n: nn.Parameter(apart(w)) for n, w in program.state_dict().items()}
    with mode():
        expected = tree_leaves(module(*args))
        assert_close(tree_leaves(program(*apart(args))), expected)
        program.load_state_dict(weights, assign=True)
        assert_close(tree_leaves(program(*apart(args))), expected)
    if mode is nullcontext:
        ours, theirs = (results(m, *a)[1] for m, a in ((program, apart(args)), (module, args)))
        assert_close(ours, theirs)


@exported_kinds
@modes
def test_exported_programs_under_autocast(kind, mode):
    """With states of the example's dtype and of autocast's, of which results take one."""
    module, args = example(kind)
    wrapped = nn.Sequential(nn.Linear(args[0].size(-1), args[0].size(-1)), module)
    wrapped.forward = lambda x, *rest: wrapped[1](wrapped[0](x), *rest)
    program = export(wrapped, args).module()
    for given in ((args), (args[0], *torch.utils._pytree.tree_map(torch.Tensor.bfloat16, args[1:]))):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            ours, theirs = tree_leaves(program(*given)), tree_leaves(wrapped(*given))
            assert [t.dtype for t in ours] == [t.dtype for t in theirs]
            assert_close(ours, theirs)
    if mode is nullcontext:
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = ([r.float() for r in results(m, *args)[1]] for m in (program, wrapped))
        assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_exported_programs_in_float64_under_autocast():
    module, x = seqkernels.GRU(5, 7).double(), torch.randn(4, 3, 5).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(export(module, (x,)).module()(x), module(x))


@kinds
def test_exported_programs_with_lengths_under_autocast(kind):
    module, lengths = WithLengths(getattr(seqkernels, kind)(5, 7)), torch.tensor([4, 0, 2])
    x = torch.randn(4, 3, 5)
    program = export(module, (x, lengths)).module()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(program(x, lengths), module(x, lengths))


class WithCellStates(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, resets):
        return self.inner(x, resets=resets, return_cell_states=True)


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"num_layers": 2, "bidirectional": True}])
def test_exported_programs_with_cell_states_under_autocast(options):
    x, resets = torch.randn(4, 3, 5), torch.rand(4, 3) < 0.4
    module = WithCellStates(seqkernels.LSTM(5, 7, **options))
    program = export(module, (x, resets)).module()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(program(x, resets), module(x, resets), rtol=1e-2, atol=1e-2)


@exported_kinds
def test_programs_exported_under_autocast_compile(kind):
    module, args = example(kind)
    with torch.autocast("cpu", torch.bfloat16):
        program = export(module, args).module()
        assert_close(tree_leaves(in_one_graph(program)(*args)), tree_leaves(module(*args)))


@exported_kinds
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:seqkernels falls back")
def test_exported_programs_under_torch_func(kind, frozen):
    module, args = example(kind)
    module.requires_grad_(not frozen)
    # torch's own oneDNN layers have no forward-mode derivatives
    reference, x = copy.deepcopy(module).double(), args[0]
    program = export(module, args).module()

    def one(f, like):
        rest = torch.utils._pytree.tree_map(lambda t: t.to(like), args[1:])
        return lambda x: tree_leaves(f(x.to(like), *rest))[0].to(x)

    ours, theirs = one(program, torch.float32), one(reference, torch.float64)
    close = {"rtol": 1e-4, "atol": 1e-5}
    expected, direction = torch.func.jvp(theirs, (x,), (torch.ones_like(x),)), torch.ones_like(x)
    assert_close(torch.func.jvp(ours, (x,), (direction,)), expected, **close)
    for mode in (nullcontext, torch.no_grad):
        with mode(), forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, direction)))
            assert_close((y, tangent), expected, **close)

    gradient = [torch.func.grad(lambda x, f=f: f(x).sin().sum()) for f in (ours, theirs)]
    assert_close(gradient[0](x), gradient[1](x), **close)
    xs = torch.stack([x, 2 * x])
    for f, g in ((ours, theirs), gradient):
        assert_close(torch.vmap(f)(xs), torch.stack([g(x) for x in xs]), **close)
    assert_close(torch.func.jacrev(ours)(x), torch.func.jacfwd(theirs)(x), **close)


def test_strict_exported_programs_refuse_torch(monkeypatch):
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    x = torch.randn(4, 3, 5)
    program = export(seqkernels.GRU(5, 7), (x,)).module()
    with pytest.raises(RuntimeError, match="do not see kernels in exported programs"):
        torch.func.jvp(lambda x: program(x)[0], (x,), (x,))


@modes
def test_errors_of_exported_programs_say_what_is_wrong(mode):
    module = nn.GRUCell(5, 7)
    seqkernels.swap_(holder := nn.ModuleList([module]))
    program = export(holder[0], (torch.randn(3, 5), torch.randn(3, 7))).module()
    with mode(), pytest.raises(RuntimeError, match=r"expected h as float32 \[3, 7\] on cpu, got float64"):
        program(torch.randn(3, 5), torch.randn(3, 7).double())


@cells
def test_cells_of_one_tensor_twice_in_one_graph(kind):
    """As decoders feed themselves; torch.compile wants the inputs of a Function distinct."""
    module = getattr(seqkernels, kind)(7, 7)
    module.bias_hh = module.bias_ih
    h = torch.randn(3, 7, requires_grad=True)
    hx = (h, h) if kind == "LSTMCell" else h
    assert_close(results(in_one_graph(module), h, hx), results(module, h, hx))


@kinds
def test_layers_of_one_tensor_twice_in_one_graph(kind):
    module = getattr(seqkernels, kind)(7, 7, bidirectional=True)
    module.weight_hh_l0_reverse, module.bias_hh_l0 = module.weight_hh_l0, module.bias_ih_l0
    h = torch.randn(2, 3, 7, requires_grad=True)
    hx = (h, h) if kind == "LSTM" else h
    assert_close(results(in_one_graph(module), h, hx), results(module, h, hx))
