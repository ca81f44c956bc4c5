"""swap_, unswap_, patch and explain: other classes, the same modules."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import GRU as GRU_IMPORTED_BY_NAME
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as SDPA_IMPORTED_BY_NAME
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import seqkernels


class OwnForward(nn.LSTM):
    def forward(self, x, hx=None):
        return super().forward(x * 2, hx)


class Subclass(nn.GRU):
    pass


class Model(nn.Module):
    """Every module that can be swapped, on one path."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            [nn.LSTM(6, 8, 2, bidirectional=True, dropout=0.2), nn.GRU(16, 8), nn.RNN(8, 8)]
        )
        self.cells = nn.ModuleDict({n: getattr(nn, n)(8, 8) for n in ("GRUCell", "RNNCell", "LSTMCell")})
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x)
        for cell in self.cells.values():
            x = torch.stack([h[0] if isinstance(h, tuple) else h for h in map(cell, x)])
        x, _ = self.attention(x, x, x)
        return self.head(x)


def classes(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules()}


OURS = {getattr(seqkernels, name) for name in seqkernels.nn.DROP_INS}
THEIRS = {getattr(nn, name) for name in seqkernels.nn.DROP_INS}
tokens = torch.randint(0, 11, (5, 3), generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_swaps_every_module_and_back():
    model = Model()
    expected = model.eval()(tokens)
    report = seqkernels.swap_(model)
    assert classes(model) >= OURS
    assert not classes(model) & THEIRS
    assert len(report.swapped) == 7
    assert not report.kept
    assert_close(model(tokens), expected)
    assert seqkernels.unswap_(model) is model
    assert classes(model) >= THEIRS
    assert not classes(model) & OURS
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("function", [seqkernels.swap_, seqkernels.unswap_, seqkernels.explain])
def test_what_is_no_module_is_told(function):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got list"):
        function([nn.LSTM(3, 3)])


def test_the_model_itself_may_be_a_recurrent_module():
    model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = model(x)
    assert len(seqkernels.swap_(model).swapped) == 1
    assert type(model) is seqkernels.LSTM
    assert_close(model(x), expected)


def test_training_goes_on_with_the_same_optimizer_parameters_and_hooks():
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (model, twin)]
    first = [train(m, o, 3) for m, o in zip((model, twin), optimizers, strict=True)]
    assert first[0] == first[1]
    calls = []
    model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    parameters = list(model.parameters())
    seqkernels.swap_(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    swapped, plain = (train(m, o, 10) for m, o in zip((model, twin), optimizers, strict=True))
    assert swapped == pytest.approx(plain, abs=1e-4)
    assert plain[-1] < plain[0]
    assert len(calls) == 10


def test_state_dict_and_whole_model_are_saved_and_loaded():
    model = Model().eval()
    expected = model(tokens)
    seqkernels.swap_(model)
    fresh = Model().eval()
    fresh.load_state_dict(model.state_dict())
    assert_close(fresh(tokens), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert classes(loaded) == classes(model)
    assert_close(loaded(tokens), expected)


def test_models_of_older_pickles_swap():
    """A module that was pickled long ago has no attributes of ours."""
    model = nn.GRU(3, 4)
    assert not {"recompute", "_prepacked"} & set(model.__dict__)
    seqkernels.swap_(model)
    assert model.recompute is False
    model.recompute = True
    model.prepack_()
    seqkernels.unswap_(model)
    assert not {"recompute", "_prepacked"} & set(model.__dict__)


def test_unswap_leaves_a_module_whose_forward_was_wrapped_since():
    """As accelerate's hooks and profilers do: what they put in its place calls our forward."""
    model, x = nn.Sequential(nn.LSTM(3, 4), nn.GRU(3, 4)), torch.randn(5, 2, 3)
    expected = model[0](x)
    seqkernels.swap_(model)
    model[0].recompute, forward = True, model[0].forward
    model[0].forward = lambda *args: forward(*args)
    with pytest.warns(UserWarning, match=r"cannot unswap 0 \(LSTM\): its forward is replaced"):
        seqkernels.unswap_(model)
    assert [type(m) for m in model] == [seqkernels.LSTM, nn.GRU]
    assert model[0].recompute
    assert_close(model[0](x), expected)
    del model[0].forward
    assert type(seqkernels.unswap_(model)[0]) is nn.LSTM


def test_unswap_leaves_a_layer_its_path_in_python_where_attention_stays_ours():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    seqkernels.swap_(layer)
    layer.self_attn.forward = layer.self_attn.forward
    with pytest.warns(UserWarning, match=r"cannot unswap self_attn \(MultiheadAttention\)"):
        seqkernels.unswap_(layer)
    assert layer.activation_relu_or_gelu == 0
    del layer.self_attn.forward
    assert seqkernels.unswap_(layer).activation_relu_or_gelu == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_what_is_kept_and_why():
    replaced = nn.LSTM(3, 4)
    replaced.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "own": OwnForward(3, 4),
            "sub": Subclass(3, 4),
            "replaced": replaced,
            "scripted": torch.jit.script(nn.LSTM(3, 4)),
            "meta": nn.LSTM(3, 4, device="meta"),
            "good": nn.GRU(3, 4),
        }
    )
    report = seqkernels.swap_(model)
    reasons = {d.name: d.reason for d in report}
    assert reasons == {
        "own": "OwnForward has its own forward",
        "sub": "Subclass is a subclass: derive it from seqkernels.GRU instead",
        "replaced": "its forward is replaced on the instance",
        "scripted": "torch.jit.script has compiled it",
        "meta": "there are kernels for cpu and cuda tensors, not for meta",
        "good": None,
    }
    assert type(model["own"]) is OwnForward
    assert type(model["meta"]) is nn.LSTM
    lines = str(report).splitlines()
    assert lines[0] == "swapped 1 of 6 modules"
    assert any(line.split() == ["good", "GRU", "swapped"] for line in lines)


def test_on_unsupported_raise_changes_nothing():
    model = nn.ModuleList([nn.GRU(3, 4), OwnForward(3, 4)])
    with pytest.raises(ValueError, match=r"cannot swap 1 \(OwnForward\): OwnForward has its own forward"):
        seqkernels.swap_(model, on_unsupported="raise")
    assert type(model[0]) is nn.GRU
    with pytest.raises(ValueError, match="on_unsupported must be 'keep' or 'raise', got 'ignore'"):
        seqkernels.swap_(model, on_unsupported="ignore")


def test_filter():
    model = Model()
    report = seqkernels.swap_(model, lambda name, module: name.startswith("layers"), on_unsupported="raise")
    assert [d.name for d in report.swapped] == ["layers.0", "layers.1", "layers.2"]
    assert {d.reason for d in report.kept} == {"left out by filter_fn"}
    assert len(seqkernels.swap_(model).swapped) == 4
    assert not seqkernels.swap_(model)


def test_parametrized_modules_swap():
    model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    parametrizations.weight_norm(model, "weight_hh_l0")
    expected = model(x)
    assert len(seqkernels.swap_(model).swapped) == 1
    assert isinstance(model, seqkernels.LSTM)
    assert_close(model(x), expected)
    assert explain_kinds(model) == ["seqkernels.LSTM"]
    seqkernels.unswap_(model)
    assert isinstance(model, nn.LSTM)
    assert torch.equal(model(x)[0], expected[0])


def test_copies_of_a_parametrized_module_swap_each_for_itself():
    """They share the class that the parametrization made."""
    x, plain = torch.randn(5, 2, 3), parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    model = nn.ModuleList([copy.deepcopy(plain), copy.deepcopy(plain)])
    expected = plain(x)
    assert len(seqkernels.swap_(model).swapped) == 2
    assert isinstance(plain, nn.GRU)
    assert all(isinstance(m, seqkernels.GRU) for m in model)
    seqkernels.unswap_(model[0])
    assert [isinstance(m, nn.GRU) for m in model] == [True, False]
    parametrize.remove_parametrizations(model[1], "weight_hh_l0")
    assert type(model[1]) is seqkernels.GRU
    for module in (plain, *model):
        assert_close(module(x), expected)


class OursDerived(seqkernels.LSTM):
    pass


class OurCellDerived(seqkernels.GRUCell):
    def forward(self, x):
        return super().forward(x * 2)


def test_what_is_derived_from_ours_is_ours():
    model = nn.ModuleList([OursDerived(3, 4), OurCellDerived(3, 4)])
    assert not seqkernels.swap_(model, on_unsupported="raise")
    assert explain_kinds(model) == ["seqkernels.LSTM", "seqkernels.GRUCell"]
    seqkernels.unswap_(model)
    assert [type(m) for m in model] == [OursDerived, OurCellDerived]
    assert explain_kinds(seqkernels.LSTMCell(3, 4)) == ["seqkernels.LSTMCell"]


def test_modules_whose_weights_are_plain_tensors_swap():
    model, x = nn.RNN(3, 4, bias=False), torch.randn(5, 2, 3)
    expected = model(x)
    for name, parameter in dict(model.named_parameters()).items():
        delattr(model, name)
        setattr(model, name, parameter.detach())
    assert len(seqkernels.swap_(model).swapped) == 1
    assert explain_kinds(model) == ["seqkernels.RNN"]
    assert_close(model(x), expected)


def explain_kinds(model: nn.Module) -> list[str]:
    return [line.split(": ")[1].split(" on ")[0] for line in seqkernels.explain(model).splitlines()]


class Straight(Model):
    """The same without loops over values, which torch.fx cannot trace."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x)
        h, c = self.cells["LSTMCell"](self.cells["RNNCell"](self.cells["GRUCell"](x[0])), (x[1], x[2]))
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.head(attended) + self.head(h + c)


class WithExtras(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = seqkernels.LSTM(3, 4)

    def forward(self, x, lengths):
        output, states, cells = self.lstm(x, lengths=lengths, return_cell_states=True)
        return output, states[1], cells


def test_symbolic_tracing_sees_one_node_as_of_torchs_modules():
    model, graphs = Straight().eval(), []
    expected = model(tokens)
    for _ in range(2):
        traced = torch.fx.symbolic_trace(model)
        graphs.append([(node.op, node.target) for node in traced.graph.nodes])
        assert_close(traced(tokens), expected)
        seqkernels.swap_(model)
    assert graphs[0] == graphs[1]
    seqkernels.unswap_(traced)
    assert_close(traced(tokens), expected)
    model, x, lengths = WithExtras(), torch.randn(5, 2, 3), torch.tensor([5, 2])
    assert_close(torch.fx.symbolic_trace(model)(x, lengths), model(x, lengths))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("with_states", [False, True])
def test_nodes_have_the_arguments_of_torchs(kind, with_states):
    """Passes over graphs look at how many there are."""
    arguments = []
    for module in (getattr(nn, kind)(3, 4), getattr(seqkernels, kind)(3, 4)):
        model = WithStates(module) if with_states else nn.Sequential(module)
        nodes = [n for n in torch.fx.symbolic_trace(model).graph.nodes if n.op == "call_module"]
        arguments += [(str(n.args), str(n.kwargs)) for n in nodes]
    assert arguments[0] == arguments[1]


class WithStates(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, hx):
        return self.inner(x, hx)


def test_patch():
    with seqkernels.patch():
        inside = [
            nn.LSTM(3, 4, 2),
            nn.GRUCell(3, 4),
            GRU_IMPORTED_BY_NAME(3, hidden_size=4),
            nn.RNN(3, 4, 1, "relu"),
        ]
        with seqkernels.patch():
            nested = nn.RNN(3, 4)
        still_inside = nn.LSTM(3, 4)
        kept = [Subclass(3, 4), OwnForward(3, 4)]
    outside = [nn.LSTM(3, 4), GRU_IMPORTED_BY_NAME(3, 4), nn.GRUCell(3, 4)]
    assert [type(m) for m in inside] == [seqkernels.LSTM, seqkernels.GRUCell, seqkernels.GRU, seqkernels.RNN]
    assert [type(nested), type(still_inside)] == [seqkernels.RNN, seqkernels.LSTM]
    assert inside[3].nonlinearity == "relu"
    assert [type(m) for m in kept] == [Subclass, OwnForward]
    assert [type(m) for m in outside] == [nn.LSTM, nn.GRU, nn.GRUCell]


def test_patches_may_end_in_any_order():
    """As those of several threads do."""
    first, second = seqkernels.patch(), seqkernels.patch()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert type(nn.LSTM(3, 4)) is seqkernels.LSTM
    second.__exit__(None, None, None)
    assert type(nn.LSTM(3, 4)) is nn.LSTM
    assert nn.functional.scaled_dot_product_attention is not seqkernels.scaled_dot_product_attention


def test_patch_keeps_the_initial_weights_and_ends_with_an_exception():
    torch.manual_seed(0)
    plain = nn.LSTM(3, 4)
    torch.manual_seed(0)
    with seqkernels.patch():
        patched = nn.LSTM(3, 4)
    assert_close(patched.state_dict(), plain.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="hidden_size must be greater than zero"), seqkernels.patch():
        nn.LSTM(3, 0)
    assert type(nn.LSTM(3, 4)) is nn.LSTM


def run_afresh(program: Path, code: str) -> None:
    program.write_text(code)
    ran = subprocess.run([sys.executable, "-W", "ignore", program], stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "bias", [causal_upper_left(6, 6), causal_lower_right(6, 6), causal_lower_right(6, 9)]
)
def test_torchs_attention_knows_causal_biases_inside_patch(bias):
    """It asks them, and they compare it with what has torch's name."""
    q, (k, v) = torch.randn(1, 2, 6, 8), torch.randn(2, 1, 2, bias.seq_len_kv, 8)
    expected, ask_bias = SDPA_IMPORTED_BY_NAME(q, k, v, bias), vars(CausalBias)["__torch_function__"]
    with seqkernels.patch():
        with seqkernels.patch():
            assert_close(SDPA_IMPORTED_BY_NAME(q, k, v, attn_mask=bias), expected)
        assert_close(SDPA_IMPORTED_BY_NAME(q, k, v, bias), expected)
        assert_close(nn.functional.scaled_dot_product_attention(q, k, v, bias), expected)
        assert repr(bias) == repr(bias._materialize())
    assert vars(CausalBias)["__torch_function__"] is ask_bias


def test_causal_biases_may_be_imported_inside_patch(tmp_path):
    code = """
import torch, seqkernels
from torch.nn.functional import scaled_dot_product_attention
q = torch.randn(1, 2, 6, 8)
with seqkernels.patch():
    from torch.nn.attention.bias import causal_lower_right
    inside = scaled_dot_product_attention(q, q, q, causal_lower_right(6, 6))
torch.testing.assert_close(inside, scaled_dot_product_attention(q, q, q, is_causal=True))
"""
    run_afresh(tmp_path / "program.py", code)


class OwnAttention(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is SDPA_IMPORTED_BY_NAME:
            return "my own"
        return super().__torch_function__(func, types, args, kwargs)


def test_tensor_classes_hear_torchs_function_inside_patch():
    q = torch.randn(1, 2, 6, 8).as_subclass(OwnAttention)
    with seqkernels.patch():
        assert nn.functional.scaled_dot_product_attention(q, q, q) == "my own"


def test_torch_jit_script_inside_patch(tmp_path):
    """In a process of its own: what fails leaves the class unscriptable."""
    code = """
import torch, seqkernels
from torch.nn import functional as F
def attend(q, k, v): return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
q, layer = torch.randn(1, 2, 6, 8), torch.nn.TransformerEncoderLayer(8, 2, 16).eval()
expected = attend(q, q, q), layer(q[0])
with seqkernels.patch():
    compiled = torch.jit.script(attend), torch.jit.script(layer)
    torch.jit.script(torch.nn.TransformerEncoderLayer(8, 2, 16))
    inside = compiled[0](q, q, q), compiled[1](q[0])
torch.testing.assert_close([inside, (compiled[0](q, q, q), compiled[1](q[0]))], [expected] * 2)
torch.jit.script(torch.nn.MultiheadAttention(8, 2))
"""
    run_afresh(tmp_path / "program.py", code)


def test_explain():
    model = nn.ModuleDict({"ours": seqkernels.GRU(3, 4), "theirs": nn.GRU(3, 4), "own": OwnForward(3, 4)})
    isa, threads = torch.ops.seqkernels.get_isa(), torch.get_num_threads()
    assert seqkernels.explain(model).splitlines() == [
        f"ours: seqkernels.GRU on {isa}, float32, {threads} threads",
        "theirs: torch's GRU, not swapped yet: seqkernels.swap_(model)",
        "own: torch's OwnForward, OwnForward has its own forward",
    ]
    with torch.autocast("cpu", torch.bfloat16):
        assert seqkernels.explain(model["ours"], torch.zeros(5, 2, 3)).split(", ")[1] == "bfloat16"
    named = seqkernels.explain(model["own"], x=torch.zeros(5, 2, 3))
    assert named == "(model): torch's OwnForward, OwnForward has its own forward"
    assert seqkernels.explain(nn.Linear(1, 1)) == "there is nothing to swap in Linear"


def test_explain_calls_a_model_with_scripted_modules():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.LSTMCell(3, 4))), nn.Module())
    model.forward = lambda x: model[0](x)
    assert seqkernels.explain(model, torch.zeros(2, 3)) == (
        "0.0: torch's RecursiveScriptModule, torch.jit.script has compiled it"
    )


def test_explain_with_inputs_says_what_runs_for_them(monkeypatch):
    monkeypatch.setattr(seqkernels.support, "_told", set())  # each reason is told once in a process
    model = seqkernels.LSTM(3, 4)
    assert seqkernels.explain(model, torch.zeros(5, 2, 3)).startswith("(model): seqkernels.LSTM on ")
    packed = nn.utils.rnn.pack_sequence([torch.zeros(5, 3)])
    assert seqkernels.explain(model, input=packed).startswith("(model): seqkernels.LSTM on ")
    meta = seqkernels.LSTM(3, 4, device="meta")
    with pytest.warns(
        UserWarning, match="falls back to torch: there are kernels for cpu and cuda tensors, not for meta"
    ):
        text = seqkernels.explain(meta, torch.zeros(5, 2, 3, device="meta"))
    why = "there are kernels for cpu and cuda tensors, not for meta"
    assert text == f"(model): seqkernels.LSTM, but torch runs: {why}"
    whole = Model()
    seqkernels.swap_(whole, lambda name, _: name != "layers.1")
    whole.unused = seqkernels.GRU(3, 4)
    lines = dict(line.split(": ", 1) for line in seqkernels.explain(whole, tokens).splitlines())
    assert lines["layers.0"].startswith("seqkernels.LSTM on ")
    assert lines["layers.1"].startswith("torch's GRU, not swapped yet")
    assert lines["unused"] == "seqkernels.GRU, not called"
    assert not any(m._forward_pre_hooks for m in whole.modules())


class Mixer(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(8, 2, 16)
        del self.self_attn
        self.mixer = nn.GRU(8, 8)


def test_a_layer_without_attention():
    model = nn.ModuleList([Mixer(), nn.LSTM(8, 8)])
    assert len(seqkernels.swap_(model).swapped) == 2
    assert type(seqkernels.unswap_(model)[1]) is nn.LSTM


def test_explain_knows_what_sdpa_kernel_forbids():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        assert "but torch runs: torch.nn.attention.sdpa_kernel" in seqkernels.explain(
            seqkernels.MultiheadAttention(8, 2)
        )


def test_explain_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), seqkernels.GRUCell(3, 4))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.arange(15.0).view(5, 3)
    assert "GRUCell on" in seqkernels.explain(model, x)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


class WithState(nn.Module):
    """Buffers of all kinds: that forward reads, that share memory, that it gives another tensor."""

    def __init__(self):
        super().__init__()
        self.rnn = seqkernels.GRU(3, 4)
        self.register_buffer("scale", torch.ones(1).expand(4))
        self.register_buffer("h", None)
        self.norm = torch.jit.script(nn.BatchNorm1d(4))

    def forward(self, x):
        y, self.h = self.rnn(x, self.h)
        return self.norm(y.flatten(0, 1)) * self.scale


def test_explain_leaves_a_model_with_state_as_it_was():
    x = torch.randn(5, 2, 3)
    model = WithState()
    model(x)
    model.h = model.h.detach()
    state, h = copy.deepcopy(model.state_dict()), model.h
    assert "rnn: seqkernels.GRU on" in seqkernels.explain(model, x)
    assert model.h is h
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    loss = model.eval()(x).sum()  # its graph has saved buffers
    seqkernels.explain(model, x)
    loss.backward()
    model = WithState()
    seqkernels.explain(model, x)
    assert model.h is None
    with torch.inference_mode():
        model = WithState().eval()
    assert "rnn: seqkernels.GRU on" in seqkernels.explain(model, x)


def test_explain_hands_on_a_keyword_named_module():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = seqkernels.GRU(3, 4)

        def forward(self, x, module=None):
            return self.rnn(x)

    assert "rnn: seqkernels.GRU on" in seqkernels.explain(Takes(), torch.randn(5, 2, 3), module=1)
