"""Swap torch's modules for ours in an existing model, and back; say which of both runs, and why.

A swap changes the class of a module and nothing else: parameters, buffers, hooks and optimizers stay valid.
But torch.nn.TransformerEncoderLayer has a path in C++ for inference that reads the weights of its attention
and never calls it; where that is ours, the layer is told to take its path in Python.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.jit._builtins import _register_builtin
from torch.nn import Module, TransformerEncoder, TransformerEncoderLayer
from torch.nn import functional as F
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from seqkernels import attention, nn, pipeline, support
from seqkernels.triton import choice

Classes = dict[type[Module], type[Module]]
Call = dict[str, Any]  # arguments by name
OURS: Classes = {getattr(torch.nn, name): getattr(nn, name) for name in nn.DROP_INS}
TORCHS: Classes = {ours: theirs for theirs, ours in OURS.items()}
REPLACED = "its forward is replaced on the instance"

# so that torch.jit.script compiles what it finds under torch's name inside `patch`
_register_builtin(attention.scaled_dot_product_attention, "aten::scaled_dot_product_attention")


@dataclass(frozen=True)
class Decision:
    """What became of one module: swapped, or kept for `reason`."""

    name: str
    module: Module
    reason: str | None


class SwapReport(tuple[Decision, ...]):
    """The decisions of one `swap_`. Prints as a table."""

    @property
    def swapped(self) -> list[Decision]:
        return [d for d in self if d.reason is None]

    @property
    def kept(self) -> list[Decision]:
        return [d for d in self if d.reason is not None]

    def __str__(self) -> str:
        rows = [(d.name or "(model)", type(d.module).__name__, d.reason or "swapped") for d in self]
        name_width, class_width = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
        lines = [f"{name:<{name_width}}  {kind:<{class_width}}  {fate}" for name, kind, fate in rows]
        return "\n".join([f"swapped {len(self.swapped)} of {len(self)} modules", *lines])

    __repr__ = __str__


def swap_(
    model: Module, filter_fn: Callable[[str, Module], bool] | None = None, on_unsupported: str = "keep"
) -> SwapReport:
    """Make every torch.nn.LSTM, GRU, RNN, cell and MultiheadAttention in `model`, or itself, ours, in place.

    filter_fn(name, module) says which to swap, all if None. on_unsupported: "keep" leaves what cannot be
    swapped as it is, with the reason in the report; "raise" raises ValueError before anything is swapped.
    Equal to setting `module.__class__` of each. `unswap_` undoes it. LSTM, GRU and RNN are then instances of
    torch.nn.RNNBase, not of torch.nn.LSTM and its kin: code that asks which it has may look at `.mode`.
    Swap a torch.nn.TransformerEncoder, not the layer that it is built from: with such a layer torch leaves
    out its path of nested tensors, and with it the zeros at padded places.
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable or None, got {type(filter_fn).__name__}")
    if on_unsupported not in ("keep", "raise"):
        raise ValueError(f"on_unsupported must be 'keep' or 'raise', got {on_unsupported!r}")
    decisions = []
    for name, module in _modules(model):
        if _kind_of_ours(module):
            continue
        reason = _why_keep(module)
        if filter_fn is not None and not filter_fn(name, module):
            reason = "left out by filter_fn"
        elif reason is not None and on_unsupported == "raise":
            raise ValueError(f"cannot swap {name or 'the model'} ({type(module).__name__}): {reason}")
        decisions.append(Decision(name, module, reason))
    report = SwapReport(decisions)
    for decision in report.swapped:
        _change_class(decision.module, OURS)
    for layer in _layers_of_ours(model):
        _take_path_in_python(layer)
    return report


def unswap_(model: Module) -> Module:
    """Make all our modules in `model` torch.nn's, in place. Returns the model.

    One whose forward is replaced on the instance stays ours, with a warning: what replaced it may call ours.
    Instances of your own subclasses of our classes stay what they are.
    """
    modules = list(_modules(model))
    layers = _layers_of_ours(model)
    for name, module in modules:
        if _class(module) not in TORCHS:
            continue
        if "forward" in module.__dict__:
            which = f"{name or 'the model'} ({type(module).__name__})"
            warnings.warn(f"seqkernels cannot unswap {which}: {REPLACED}", stacklevel=2)
            continue
        for attribute in ("recompute", "_prepacked"):
            module.__dict__.pop(attribute, None)
        _change_class(module, TORCHS)
    for layer in layers:
        if not isinstance(layer.self_attn, nn.MultiheadAttention):
            _take_any_path(layer)
    return model


_patching = Lock()
_patches: list[Callable[[], None]] = []  # what undoes it, once for each patch() that is active


@contextmanager
def patch() -> Iterator[None]:
    """Inside, in the whole process, torch.nn.LSTM, GRU, RNN, cells and MultiheadAttention become ours when
    constructed, and torch.nn.functional.scaled_dot_product_attention is ours.

    However a class was imported, because its constructor is what changes. Subclasses stay what they are.
    Our LSTM, GRU and RNN are no instances of torch.nn's: code that asks isinstance for those does not see
    them; then build the model first and `swap_` it afterwards. A tensor class's __torch_function__ is called
    with torch's function as ever, which `torch.nn.functional.scaled_dot_product_attention` is not in here.
    """
    with _patching:
        _patches.append(_patches[0] if _patches else _patch())
    try:
        yield
    finally:
        with _patching:
            undo = _patches.pop()
            if not _patches:  # whoever came first: threads end in any order
                undo()


def _patch() -> Callable[[], None]:
    constructors = {cls: cls.__init__ for cls in (*OURS, TransformerEncoderLayer, TransformerEncoder)}
    # Here, because torch._dynamo comes with it, which takes as long as importing torch. Always, because
    # somebody may import it inside.
    from torch.nn.attention.bias import CausalBias

    sdpa, ask_bias = F.scaled_dot_product_attention, vars(CausalBias)["__torch_function__"]
    CausalBias.__torch_function__ = _recognising(sdpa, ask_bias)
    for cls, init in constructors.items():
        cls.__init__ = _swapping(cls, init)
    F.scaled_dot_product_attention = attention.scaled_dot_product_attention

    def undo() -> None:
        F.scaled_dot_product_attention = sdpa
        CausalBias.__torch_function__ = ask_bias
        for cls, init in constructors.items():
            cls.__init__ = init

    return undo


def _recognising(sdpa: Callable[..., Tensor], ask_bias: classmethod) -> classmethod:
    """A CausalBias knows attention by the name in torch.nn.functional, which `sdpa` has lost."""

    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is sdpa:
            return cls._dispatch(*args, **(kwargs or {}))
        return ask_bias.__func__(cls, func, types, args, kwargs)

    return classmethod(__torch_function__)


def _swapping(cls: type[Module], init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def init_and_swap(self, *args, **kwargs) -> None:
        given = []
        if cls is TransformerEncoder:  # it warns when its layers have one path only
            given = _layers_of_ours(args[0] if args else kwargs["encoder_layer"])
            for layer in given:
                _take_any_path(layer)
        init(self, *args, **kwargs)
        if type(self) is cls and cls in OURS:
            _change_class(self, OURS)
        if isinstance(self, TransformerEncoderLayer | TransformerEncoder):
            for layer in (*given, *_layers_of_ours(self)):
                _take_path_in_python(layer)

    return init_and_swap


def explain(module: Module, /, *inputs, **kwargs) -> str:
    """Which kernels run for every such module in `module`, or why torch does, one line each.

    With inputs, `module` is called with them once, without gradients, and the answer holds for what each of
    them gets; buffers, such as the statistics of batch norms, and the generator of random numbers stay as
    they are. Without, it holds for inputs of the dtype and device of the parameters.
    """
    modules = dict(_modules(module))
    seen: dict[str, Call] = {}
    if inputs or kwargs:
        hooks = [
            m.register_forward_pre_hook(_recorder(seen, name), with_kwargs=True)
            for name, m in modules.items()
            if not isinstance(m, torch.jit.ScriptModule)  # takes no hooks, and what it gets does not matter
        ]
        try:
            with torch.no_grad(), torch.random.fork_rng(), _other_buffers(module):
                module(*inputs, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    else:
        seen = {name: _call_with(_weight(m)) for name, m in modules.items()}
    lines = [f"{name or '(model)'}: {_explain(m, seen.get(name))}" for name, m in modules.items()]
    return "\n".join(lines) if lines else f"there is nothing to swap in {type(module).__name__}"


@contextmanager
def _other_buffers(module: Module) -> Iterator[None]:
    """Copies take the places of buffers meanwhile: whatever forward does, these keep their values, their
    versions, which graphs of before check, and their names."""
    script = torch.jit.ScriptModule  # keeps its buffers to itself: what it writes is written back
    before = [(m._buffers, dict(m._buffers)) for m in module.modules() if not isinstance(m, script)]
    copies = {id(b): b.clone() for _, given in before for b in given.values() if b is not None}
    scripted = [b for m in module.modules() if isinstance(m, script) for b in m.buffers(recurse=False)]
    written = [(b, b.clone()) for b in scripted]
    try:
        for buffers, given in before:
            buffers.update((name, b if b is None else copies[id(b)]) for name, b in given.items())
        yield
    finally:
        for buffers, given in before:
            buffers.clear()
            buffers.update(given)
        for buffer, value in written:
            if not torch.equal(buffer, value):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)


def _recorder(seen: dict[str, Call], name: str) -> Callable:
    def record(module: Module, args: tuple, kwargs: dict) -> None:
        attends = isinstance(module, torch.nn.MultiheadAttention)
        input = args[0] if args else kwargs.get("query" if attends else "input")
        simple = isinstance(input, Tensor) and all(kwargs.get(e) is None for e in ("lengths", "resets"))
        rows = int(input.batch_sizes[0]) if isinstance(input, PackedSequence) else None
        input = input.data if isinstance(input, PackedSequence) else input
        call = _call_with(input if isinstance(input, Tensor) else _weight(module))
        call |= {"simple": simple, "rows": rows}
        if _class(module) is nn.MultiheadAttention:
            call |= signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments
        seen[name] = call

    return record


def _call_with(input: Tensor) -> Call:
    device, dtype = input.device.type, input.dtype
    if support.autocasts(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return {"input": input, "dtype": str(dtype).removeprefix("torch.")}


def _explain(module: Module, call: Call | None) -> str:
    cls = _kind_of_ours(module)
    if cls is None:
        reason = _why_keep(module) or "not swapped yet: seqkernels.swap_(model)"
        return f"torch's {_class(module).__name__}, {reason}"
    if call is None:
        return f"seqkernels.{cls.__name__}, not called"
    x = call["input"]
    if cls is nn.MultiheadAttention:
        reason = support.why_torch_attends(x, module._head_dim)
        if not reason and support.forbids_flash():
            reason = "torch.nn.attention.sdpa_kernel forbids flash attention"
    else:
        reason = support.why_torch(x)
    if reason:
        return f"seqkernels.{cls.__name__}, but torch runs: {reason}"
    isa, dtype = torch.ops.seqkernels.get_isa(), call["dtype"]
    if support.on_gpu(x):
        plan = (_attention_plan if cls is nn.MultiheadAttention else _cuda_plan)(module, call)
        return f"seqkernels.{cls.__name__} on cuda, {dtype}, {plan}"
    return f"seqkernels.{cls.__name__} on {isa}, {dtype}, {torch.get_num_threads()} threads"


def _attention_plan(module: nn.MultiheadAttention, call: Call) -> str:
    """Whose kernels attend between our projections."""
    if "query" not in call:
        return "Triton kernels, or torch's where those are faster"

    def heads(x: Tensor) -> Tensor:
        N, T = (1, x.size(0)) if x.dim() == 2 else x.shape[:2] if module.batch_first else x.shape[1::-1]
        return torch.empty(N, module.num_heads, T, module._head_dim, dtype=x.dtype, device="meta")

    q, k = heads(call["query"]), heads(call["key"])
    mask = next((call[m] for m in ("attn_mask", "key_padding_mask") if call.get(m) is not None), None)
    reason = None if call.get("need_weights", True) else choice.why_torch(q, k, k, mask)
    return f"torch's attention kernels ({reason})" if reason else "Triton kernels"


def _cuda_plan(module: Module, call: Call) -> str:
    """The kernels of a layer, and whether layers run at the same time where the length is known."""
    if isinstance(module, RNNCellBase):
        return "one fused step"
    x = call["input"]
    gates, H, L = module.weight_hh_l0.size(0) // module.hidden_size, module.hidden_size, module.num_layers
    rows = call.get("rows") or 1
    T, B = (x.size(0), rows) if x.dim() == 2 else x.shape[:2][:: -1 if module.batch_first else 1]
    D, projected = 2 if module.bidirectional else 1, module.proj_size > 0
    words = pipeline.cuda_plan(x, gates, B, H, D, projected)
    if L == 1 or D == 2 or projected or not call.get("simple"):
        return words
    plans = [pipeline.fit(x, gates, T, B, H, L, gradients) for gradients in (False, True)]
    forward, training = (str(p or "one layer after the other") for p in plans)
    return f"{words}, {forward}" + ("" if training == forward else f", with gradients {training}")


def _modules(model: Module) -> Iterator[tuple[str, Module]]:
    if not isinstance(model, Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule) and module.original_name in nn.DROP_INS
        if scripted or isinstance(module, RNNBase | RNNCellBase | torch.nn.MultiheadAttention):
            yield name, module


def _layers_of_ours(model: Module) -> list[TransformerEncoderLayer]:
    layers = (m for m in model.modules() if isinstance(m, TransformerEncoderLayer))
    return [m for m in layers if isinstance(getattr(m, "self_attn", None), nn.MultiheadAttention)]


def _take_path_in_python(layer: TransformerEncoderLayer) -> None:
    layer.activation_relu_or_gelu = 0


def _take_any_path(layer: TransformerEncoderLayer) -> None:
    relu = layer.activation is F.relu or isinstance(layer.activation, torch.nn.ReLU)
    gelu = layer.activation is F.gelu or isinstance(layer.activation, torch.nn.GELU)
    layer.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0


def _class(module: Module) -> type[Module]:
    """Parametrizations give a module a class of its own, derived from that which it had."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _kind_of_ours(module: Module) -> type[Module] | None:
    """The class of ours that `module` is of, maybe by a subclass that somebody derived."""
    return next((cls for cls in type(module).__mro__ if cls in TORCHS), None)


def _change_class(module: Module, to: Classes) -> None:
    cls = to[_class(module)]
    if is_parametrized(module):  # a copy of the class between, because copies of the module share it
        between = {name: v for name, v in vars(type(module)).items() if name not in _OF_THE_TYPE}
        cls = type(f"Parametrized{cls.__name__}", (cls,), between)
    module.__class__ = cls


_OF_THE_TYPE = ("__dict__", "__weakref__", "__doc__")


def _weight(module: Module) -> Tensor:
    """A parameter that says the dtype and device, as good as any; tensors may have taken the place of all."""
    return next(module.parameters(), torch.empty(0))


def _why_keep(module: Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit.script has compiled it"
    if "forward" in module.__dict__:
        return REPLACED
    cls = _class(module)
    if cls in OURS:
        why = support.why_torch_attends if cls is torch.nn.MultiheadAttention else support.why_torch
        return why(_weight(module))
    base = next((b for b in cls.__mro__ if b in OURS), None)
    if base is None or cls.forward is not base.forward:
        return f"{cls.__name__} has its own forward"
    return f"{cls.__name__} is a subclass: derive it from seqkernels.{base.__name__} instead"
