"""What all ops share around the native `_fwd` and `_bwd` calls, which know nothing of autograd.

The autograd.Functions stand outside the native ops: torch.compile traces them and sees two opaque calls.
They have a setup_context because torch.func.grad needs one. torch.export traces them away; exported programs
call `_fwd.exported` instead, which finds its Function when the program runs, or what else the ways of eager
modules are: autocast, and torch where the kernels cannot follow.
"""

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

import seqkernels.ops._library  # noqa: F401  (defines torch.ops.seqkernels)
from seqkernels import support

_library = torch.library.Library("seqkernels", "IMPL")
_KEPT = {"lse", "alibi", "sinks"}  # by autocast: in the dtype in which the kernels accumulate


class Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args):
        """torch's own, but without the inspection of a signature that takes it 40 us on every call."""
        if support.in_functorch():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)


def exported(
    name: str, differentiable: Callable, reference: Callable, dtypes: Callable = lambda *args: ()
) -> torch._ops.OpOverload:
    """`name`.exported, which takes its arguments to `differentiable` where a gradient is wanted.

    reference: the same in plain torch, with any tensors for what only backward reads. dtypes: of the results
    under autocast, from its dtype and the arguments; what it leaves out stays as it comes.
    """
    op = getattr(torch.ops.seqkernels, name).exported
    names = [argument.name for argument in op._schema.arguments]

    def in_torch(*args: object) -> object:
        support.fall_back("torch.func and forward-mode AD do not see kernels in exported programs")
        return reference(*args)

    def call(*args: object) -> object:
        if support.is_transformed():
            return in_torch(*args)
        if records(*(t for t in pytree.tree_leaves(args) if isinstance(t, Tensor))):
            return differentiable(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def cast(x: Tensor, *args: object) -> object:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if x.dtype == torch.float64:
                return op(x, *args)
            results = op(
                *(a if n in _KEPT else _cast(dtype, a) for n, a in zip(names, (x, *args), strict=True))
            )
            told = dtypes(dtype, x, *args)
            if not told:
                return results
            return *(r.to(d) for r, d in zip(results, told, strict=False)), *results[len(told) :]

    for key, kernel in (
        ("Autograd", call),
        ("AutocastCPU", cast),
        ("AutocastCUDA", cast),
        ("FuncTorchBatched", in_torch),
    ):
        _library.impl(f"{name}.exported", kernel, key)
    return op


def _cast(dtype: torch.dtype, value: object) -> object:
    return pytree.tree_map_only(Tensor, lambda t: autocast(dtype, t)[0], value)


def autocast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """As torch.autocast casts, which leaves float64 and what is no float as they are."""

    def casts(t: Tensor | None) -> bool:
        return t is not None and t.is_floating_point() and t.dtype != torch.float64

    return [t.to(dtype) if casts(t) else t for t in tensors]


def autocast_weights(dtype: torch.dtype, *weights: Tensor | None) -> list[Tensor | None]:
    """`autocast`, by torch's own cache: a weight's copy serves all calls until autocast ends.

    100 steps of an LSTMCell of 512 units took 450 MiB in training, torch's 40, and 1.6 times as long.
    """
    looked_on = not support.is_eager() or support.is_dispatched()
    if looked_on or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return autocast(dtype, *weights)
    return [_cached(dtype, w) for w in weights]


# The copy that torch's cache had of a weight, and of which version, since torch does not ask.
_versions: MutableMapping[Tensor, tuple[ref, int]] = WeakIdKeyDictionary()


def _cached(dtype: torch.dtype, w: Tensor | None) -> Tensor | None:
    """An empty torch.mm casts the weight and saves the copy: torch's cache has no other door."""
    plain = type(w) in (Tensor, torch.nn.Parameter) and w.dim() == 2 and w.dtype == torch.float32
    kept = plain and w.is_leaf and w.requires_grad  # by torch too
    if kept and not (w.is_cuda and torch.cuda.is_current_stream_capturing()):
        with torch.inference_mode(False), torch.enable_grad():
            nothing = torch.empty(0, w.size(0), dtype=dtype, device=w.device, requires_grad=True)
            copy = getattr(torch.mm(nothing, w).grad_fn, "_saved_mat2", None)
        if copy is not None and copy.dtype == dtype and copy.requires_grad:
            known = _versions.get(w)
            if known is None or known[0]() is not copy:
                known = _versions[w] = ref(copy), w._version
            if known[1] == w._version:
                return copy if torch.is_grad_enabled() else copy.detach()
    return autocast(dtype, w)[0]


def autocast_dtypes(
    gates: int, dtype: torch.dtype, states: Sequence[Tensor], batch_sizes: Tensor | None
) -> tuple[torch.dtype, torch.dtype]:
    """What torch gives to (output, h) and to (cells, c) of layers under autocast to dtype.

    Where torch runs a loop of single ops, a state blended with the one before takes the wider dtype.
    """
    if states[0].is_cuda:
        return dtype, dtype
    projection = gates == 4 and states[0].size(2) != states[1].size(2)
    ragged = batch_sizes is not None and int(batch_sizes[0]) > int(batch_sizes[-1])
    blends = gates == 3 or (gates == 4 and (ragged or projection))
    state_dtype = blended(dtype, states[-1]) if blends else dtype
    return dtype if projection else state_dtype, state_dtype


def blended(dtype: torch.dtype, state: Tensor) -> torch.dtype:
    """Of a new state, under autocast to dtype, into which the one before went as it was."""
    return dtype if state.is_cuda or state.dtype == dtype else torch.float32


def needs_grad(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():  # what decoding asks most
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def records(*tensors: Tensor | None) -> bool:
    """A Function has to stand around the op."""
    return needs_grad(*tensors) and not support.is_exporting()


def unit_last_stride(x: Tensor) -> Tensor:
    """The kernels walk time and batch by strides and read features as they lie: no copy of a transposed x."""
    if x.stride(-1) != 1:
        return x.clone(memory_format=torch.contiguous_format)
    # Dynamo believes that the argument of a torch.func.grad wants no gradient; what an op returns does.
    return x.view_as(x) if support.in_functorch() else x


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def one_step(*tensors: Tensor | None) -> list[Tensor | None]:
    """[B,...] -> [1,B,...]: backward of a cell is backward of a layer with T = 1, D = 1."""
    return [None if t is None else t.unsqueeze(0) for t in tensors]


def distinct(*args: object) -> Sequence[object]:
    """Dynamo wants the inputs of a Function distinct."""
    if not support.is_compiling():
        return args
    seen: list[object] = []
    for a in args:
        seen.append(a.view_as(a) if isinstance(a, Tensor) and any(a is s for s in seen) else a)
    return seen


def present(*weights: Tensor | None) -> list[Tensor]:
    return [w for w in weights if w is not None]


def no_steps(*grads: Tensor | None) -> list[Tensor | None]:
    """[1,B,...] -> [B,...]"""
    return [None if g is None else g.squeeze(0) for g in grads]


def pad_biases(weights: Sequence[Tensor]) -> list[Tensor | None]:
    """[w_ih, w_hh] or [w_ih, w_hh, b_ih, b_hh] -> always four, as the native cells take them."""
    return [*weights, *[None] * (4 - len(weights))]


def keep_none_grads(ctx) -> None:
    """An unused output costs nothing in backward. Dynamo cannot trace this call and fills in zeros."""
    if not support.is_compiling():
        ctx.set_materialize_grads(False)


def beyond_native(*grads: Tensor | None) -> bool:
    """In backward: the gradients will themselves be differentiated, or come in batches (is_grads_batched)."""
    if support.is_compiling():
        return False
    differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
    return differentiated or any(g is not None and _is_batched(g) for g in grads)


def _is_batched(grad: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def differentiate(
    reference: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """The gradients of reference(*inputs) as differentiable torch ops; a grad of None counts as zero."""
    looked_on = support.is_compiling() or support.is_transformed()
    if looked_on or any(g is not None and _is_batched(g) for g in grads):
        outputs, vjp = torch.func.vjp(reference, *inputs)
        zeros = (torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True))
        return vjp(tuple(g.to(o.dtype) for o, g in zip(outputs, zeros, strict=True)))
    # torch.func refuses saved tensor hooks, those of checkpoints too.
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(inputs[0].device.type):
        leaves = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        outputs = reference(*leaves)
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
        if not pairs:
            return [None] * len(inputs)
        outputs, grads = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, leaves, grads, create_graph=again, allow_unused=True)


def without_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if support.autocasts(device) else nullcontext()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def new_like(*tensors: Tensor) -> list[Tensor]:
    """For fakes: contiguous, where empty_like would repeat the strides of a permuted input."""
    return [t.new_empty(t.shape) for t in tensors]


def check_devices(*tensors: Tensor | None, batch_sizes: Tensor | None = None) -> None:
    """For fakes: one tensor on the meta device calls them, with whatever the others are.

    From tensors on the CPU `new_empty` would make a result of what happens to be in memory. batch_sizes are
    on the CPU beside tensors of any device.
    """
    devices = {t.device for t in tensors if t is not None}
    if batch_sizes is not None and not batch_sizes.is_cpu:
        devices.add(batch_sizes.device)
    if len(devices) > 1:
        names = sorted(map(str, devices))
        raise RuntimeError(f"seqkernels: expected one device for all tensors, got {names}")


def gradient_of_x(x: Tensor, needed: bool) -> Tensor:
    """For fakes: what is not needed has size 0."""
    return x.new_empty(x.shape if needed else 0)


def transpose(t: Tensor, a: int, b: int) -> Tensor:
    """t.transpose(a, b) of a tensor that nobody else holds: no view, as torch's results are none, where no
    gradient is recorded. Views made in no_grad may not be written into where gradients are."""
    if t.requires_grad or not support.is_eager():
        return t.transpose(a, b)
    return t.transpose_(a, b)


def reshape(t: Tensor, shape: Sequence[int]) -> Tensor:
    """t.reshape(shape), no view where `transpose` makes none. Where a gradient is recorded it has to be one:
    backward may read t again, and autograd notices through a view alone that somebody wrote into it."""
    if t.requires_grad or not support.is_eager():
        return t.reshape(shape)
    return torch.ops.aten._unsafe_view(t, shape)


def fake(name: str) -> Callable[[Callable], Callable]:
    """What a forward op gives for tensors without data, under both of its names (csrc/ops/library.cpp)."""

    def register(function: Callable) -> Callable:
        for overload in (name, f"{name}.exported"):
            torch.library.register_fake(f"seqkernels::{overload}", function)
        return function

    return register


@torch.library.register_fake("seqkernels::pack_weights")
def _(weights, gates, bidirectional):
    check_devices(*weights)
    return weights[0].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)
