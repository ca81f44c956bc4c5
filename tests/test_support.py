"""What the kernels cannot do is done by torch, and said."""

import io
import re
import warnings
from unittest import mock

import pytest
import torch
import torch.onnx
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from twins import KINDS, twins

import seqkernels
from seqkernels import support

CELLS = ("LSTMCell", "GRUCell", "RNNCell")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
every_kind = pytest.mark.parametrize("kind", [*KINDS, *CELLS])


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(support, "_told", set())
    monkeypatch.delenv("SEQKERNELS_STRICT", raising=False)


def sample(kind: str, **options) -> torch.Tensor:
    return torch.randn(*((2, 3) if kind in CELLS else (5, 2, 3)), **options)


@every_kind
def test_other_devices(kind):
    module = getattr(seqkernels, kind)(3, 4, device="meta")
    with pytest.warns(
        UserWarning, match="falls back to torch: there are kernels for cpu and cuda tensors, not for meta"
    ):
        result = module(sample(kind, device="meta"))
    assert result[0].device.type == "meta"


@every_kind
def test_compiled_modules_fall_back_and_say_so(kind, monkeypatch):
    torch.compiler.reset()
    compiled = torch.compile(getattr(seqkernels, kind)(3, 4, device="meta"), fullgraph=True, backend="eager")
    with pytest.warns(
        UserWarning, match="falls back to torch: there are kernels for cpu and cuda tensors, not for meta"
    ):
        compiled(sample(kind, device="meta"))
    torch.compiler.reset()
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    with pytest.raises(Exception, match="SEQKERNELS_STRICT=1 forbids falling back to torch"):
        compiled(sample(kind, device="meta"))


@every_kind
def test_complex(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = twins(kind, 3, 4, dtype=torch.complex64)
    x = sample(kind, dtype=torch.complex64)
    with pytest.warns(UserWarning, match="falls back to torch: there are no kernels for torch.complex64"):
        result = ours(x)
    assert_close(result, theirs(x))


@every_kind
def test_strict_makes_a_fallback_an_error(kind, monkeypatch):
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    module = getattr(seqkernels, kind)(3, 4, device="meta")
    with pytest.raises(RuntimeError, match="SEQKERNELS_STRICT=1 forbids falling back to torch"):
        module(sample(kind, device="meta"))
    getattr(seqkernels, kind)(3, 4)(sample(kind))


def test_says_each_reason_once():
    module, x = seqkernels.GRU(3, 4, device="meta"), torch.randn(5, 2, 3, device="meta")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            module(x)
        seqkernels.LSTMCell(3, 4, device="meta")(x[0])
    assert [str(w.message) for w in caught] == [
        "seqkernels falls back to torch: there are kernels for cpu and cuda tensors, not for meta"
    ]


@pytest.mark.parametrize("kind", ["GRU", "RNN", *CELLS])
@pytest.mark.filterwarnings("ignore:seqkernels falls back")
def test_forward_mode_derivatives(kind):
    ours, theirs = twins(kind, 3, 4)
    x, direction = sample(kind), sample(kind)
    tangents = []
    for module in (ours, theirs):
        with forward_ad.dual_level():
            output = module(forward_ad.make_dual(x, direction))
            output = output[0] if isinstance(output, tuple) else output
            tangents.append(forward_ad.unpack_dual(output).tangent)
    assert tangents[0].abs().max() > 0
    assert_close(*tangents)
    assert_close(*(torch.func.jvp(lambda x, m=m: m(x)[0], (x,), (direction,)) for m in (ours, theirs)))


@every_kind
def test_forward_mode_derivatives_of_gradients(kind):
    """Forward over reverse where only the gradient that comes in has a tangent."""
    module = twins(kind, 3, 4)[0]
    x = sample(kind).requires_grad_()
    output = module(x)
    y = output[0] if isinstance(output, tuple) else output
    slope, direction = torch.randn_like(y), torch.randn_like(y)
    expected = torch.autograd.grad(y, x, direction, retain_graph=True)[0]  # linear in the slope
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(slope, direction)
        gradient = torch.autograd.grad(y, x, dual)[0]
        assert_close(forward_ad.unpack_dual(gradient).tangent, expected)


@every_kind
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(kind):
    """Gradients of single samples: what torch can do of it, which is the LSTM, and else its errors."""
    ours, theirs = twins(kind, 3, 4)
    names = [name for name, _ in ours.named_parameters()]
    x = torch.randn(6, *sample(kind).shape)

    def gradients(module: nn.Module):
        def loss(weights, x):
            output = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))
            return output[0].sin().sum()

        weights = [w.detach() for w in module.parameters()]
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)

    try:
        expected = gradients(theirs)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            gradients(ours)
        return
    with pytest.warns(UserWarning, match="falls back to torch: the kernels do not know torch.vmap"):
        result = gradients(ours)
    assert_close(result, expected)


@every_kind
@pytest.mark.parametrize("frozen", [False, True])
def test_functionalize(kind, frozen):
    ours, theirs = (m.requires_grad_(not frozen) for m in twins(kind, 3, 4))
    x = sample(kind).requires_grad_()

    def gradients(module: nn.Module):
        y = torch.func.functionalize(lambda x: module(x)[0])(x)
        return torch.autograd.grad(y.sin().sum(), [x, *([] if frozen else module.parameters())])

    with pytest.warns(UserWarning, match="falls back to torch: torch.func.functionalize does not know"):
        result = gradients(ours)
    assert_close(result, gradients(theirs))
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        assert_close(torch.func.functionalize(ours)(x), ours(x))
    assert told == []


def test_functionalized_attention():
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    with pytest.warns(UserWarning, match="falls back to torch: torch.func.functionalize does not know"):
        y = torch.func.functionalize(seqkernels.scaled_dot_product_attention)(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(*(torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in (y, expected)))


@every_kind
@pytest.mark.filterwarnings("ignore:seqkernels falls back", "ignore::torch.jit.TracerWarning")
def test_tracing_records_torchs_operators(kind):
    ours, theirs = twins(kind, 3, 4)
    x = sample(kind)
    traced = [torch.jit.trace(m, x) for m in (ours, theirs)]
    kinds_of_nodes = [sorted(n.kind() for n in t.inlined_graph.nodes()) for t in traced]
    assert kinds_of_nodes[0] == kinds_of_nodes[1]
    assert_close(traced[0](x), theirs(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:seqkernels falls back", "ignore:The tensor attributes")
def test_onnx_export_sees_torchs_operators(kind):
    model, x = Wrapped(getattr(seqkernels, kind)(3, 4)), sample(kind)
    targets = []
    for exporting in (False, True):
        with mock.patch("torch.onnx.is_in_onnx_export", return_value=exporting):
            nodes = torch.export.export(model, (x,)).graph.nodes
        targets.append({str(node.target) for node in nodes if node.op == "call_function"})
    assert any("seqkernels" in target for target in targets[0])
    assert targets[1]
    assert all("aten" in target or "getitem" in target for target in targets[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings(
    "ignore:seqkernels falls back", "ignore::torch.jit.TracerWarning", "ignore:.*onnx"
)
@pytest.mark.filterwarnings("ignore:Exporting a model to ONNX", "ignore:The feature will be removed")
def test_export_to_onnx_by_tracing(kind):
    onnx = pytest.importorskip("onnx")
    model, file = Wrapped(getattr(seqkernels, kind)(3, 4)), io.BytesIO()
    torch.onnx.export(model, (sample(kind),), file, dynamo=False)
    graph = onnx.load_from_string(file.getvalue()).graph
    assert [node.op_type for node in graph.node if node.op_type in KINDS] == [kind]


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


@every_kind
def test_scripting_takes_torchs_module(kind):
    ours, theirs = twins(kind, 3, 4)
    model, x = Wrapped(ours), sample(kind)
    with pytest.warns(UserWarning, match="torch.jit.script knows torch's operators only"):
        scripted = torch.jit.script(model)
    assert_close(scripted(x), Wrapped(theirs)(x))
    assert (
        model.inner.weight_ih_l0 is ours.weight_ih_l0
        if kind in KINDS
        else model.inner.weight_ih is ours.weight_ih
    )


@pytest.mark.parametrize("kind", KINDS)
def test_extras_fall_back_to_the_reference(kind, monkeypatch):
    """Lengths, resets and cell states work where no kernel does; the reason is given all the same."""
    module = getattr(seqkernels, kind)(3, 4, 2, bidirectional=True).double()
    x, lengths, resets = torch.randn(5, 3, 3).double(), torch.tensor([2, 0, 5]), torch.rand(5, 3) < 0.4
    calls = [{"lengths": lengths}, {"lengths": lengths[::2]}, {"resets": resets}]
    calls += [{"return_cell_states": True}] if kind == "LSTM" else []
    inputs = [x, x[:, ::2], x, x]
    expected = [module(v, **kwargs) for v, kwargs in zip(inputs, calls, strict=False)]
    monkeypatch.setattr(support, "why_torch", lambda x: "a test wants it")
    with pytest.warns(UserWarning, match="falls back to torch: a test wants it"):
        result = [module(v, **kwargs) for v, kwargs in zip(inputs, calls, strict=False)]
    assert_close(result, expected)


def test_reasons_are_none_for_what_kernels_can():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert support.why_torch(torch.zeros(1, dtype=dtype)) is None
    assert support.why_torch(torch.zeros(1, dtype=torch.int64)) == "there are no kernels for torch.int64"
