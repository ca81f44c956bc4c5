"""What the drop-in modules share. Constructors, parameters and pickling are those of torch's own modules.

LSTM, GRU and RNN derive from RNNBase and not from torch.nn.LSTM and its kin, because torch.compile breaks the
graph at every instance of those.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from seqkernels import stack, support
from seqkernels.attention import is_plain
from seqkernels.ops._autograd import autocast, autocast_weights, blended, reshape, transpose
from seqkernels.ops.linear import linear

if TYPE_CHECKING:
    from typing_extensions import Self

States = Sequence[Tensor]

SMALL_PRODUCT = 2**18  # multiply-adds; torch's call takes 1.4 us, ours 4.2
MISFIT = "input, hx and weights differ in dtype, device or size"


def torchs_twin(module: Module) -> Module:
    """What torch.jit.script compiles, and puts in the place of `module` in the model that it compiles."""
    support.fall_back(
        "torch.jit.script knows torch's operators only, and puts torch's module in the place of ours"
    )
    twin = module._torch.__new__(module._torch)
    twin.__dict__.update(module.__dict__)
    return twin


def as_one_node(module: Module, input: Proxy, *args, **kwargs) -> Proxy:
    """What torch.fx.symbolic_trace records of torch's modules, while it looks into those of others.

    Without what is left at its default, which torch's own modules may not know.
    """
    parameters = signature(type(module).forward).parameters
    defaults = [p.default for p in parameters.values()][2:]  # of what comes after self and input
    while args and args[-1] is defaults[len(args) - 1]:
        args = args[:-1]
    given = {name: value for name, value in kwargs.items() if value is not parameters[name].default}
    path = input.tracer.path_of_module(module)
    return input.tracer.create_proxy("call_module", path, (input, *args), given)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear; by our product where tensors on the CPU are taken as they are and the product is large."""
    if support.is_plain_call() and x.numel() * weight.size(0) <= SMALL_PRODUCT:
        y = F.linear(x if x.dim() < 3 else x.flatten(0, -2), weight, bias)  # of three dims with a bias a view
        return y if x.dim() < 3 else reshape(y, (*x.shape[:-1], weight.size(0)))
    ours = x.device.type == "cpu" == weight.device.type and x.dtype == weight.dtype and is_plain(weight, bias)
    if ours and not torch.is_autocast_enabled("cpu") and support.why_torch(x) is None:
        return linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Recurrent(RNNBase):
    """Layers of one kind of cell. Serves as the `stack.Config` of its own call."""

    recompute = False
    _prepacked: tuple[list[tuple[Tensor, list[int], Tensor]], list[Tensor]] | None = None

    _torch: type[RNNBase]

    __prepare_scriptable__ = torchs_twin

    def _cell(self) -> stack.Cell:
        raise AssertionError("a subclass says which cell")

    def _weights(self) -> list[Tensor]:
        """All weights in torch's order, those of today."""
        if support.is_compiling():  # export does not want to see a module change its attributes
            return [getattr(self, name) for name in self._flat_weights_names]
        self._update_flat_weights()
        return self._flat_weights

    def _weights_have_changed(self) -> bool:
        parameters = self._parameters
        try:  # much faster than torch's own way, which serves where a tensor stands in for a parameter
            return any(
                r() is not parameters[n]
                for r, n in zip(self._flat_weight_refs, self._flat_weights_names, strict=True)
            )
        except (KeyError, TypeError):
            return super()._weights_have_changed()

    def _why_torch(self, input: Tensor | PackedSequence, states: States | None, extras: bool) -> str | None:
        """None if `_run` can; else why torch has to run, or to raise because the arguments do not fit."""
        packed = isinstance(input, PackedSequence)
        x, weight = input.data if packed else input, getattr(self, self._flat_weights_names[0])
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
            return MISFIT
        if isinstance(states, Tensor) and x.dim() == 3:  # elsewhere torch unpacks what it gets
            return MISFIT
        if not extras and (reason := support.why_torch(x)):
            return reason  # torch knows no extras: there the reference stands in, on any device
        casts = support.autocasts(x.device.type)

        def fits(t: Tensor, shape: tuple[int, ...]) -> bool:
            if not isinstance(t, Tensor):
                return False
            if t.layout is not torch.strided or t.is_nested:
                return False
            alike = t.dtype == weight.dtype or (casts and torch.float64 not in (t.dtype, weight.dtype))
            return t.shape == shape and t.device == weight.device and alike

        if x.dim() not in ((2,) if packed else (2, 3)) or not fits(x, (*x.shape[:-1], self.input_size)):
            return MISFIT
        sizes = input.batch_sizes if packed else None
        if packed and (sizes.dim() != 1 or sizes.dtype != torch.int64 or len(sizes) == 0):
            return MISFIT
        if states is None:
            return None
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: self._cell().states]
        L = self.num_layers * (2 if self.bidirectional else 1)
        if packed:
            rows = (int(input.batch_sizes[0]),)
        else:
            rows = (x.size(0 if self.batch_first else 1),) if x.dim() == 3 else ()
        shapes = [(L, *rows, size) for size in sizes]
        return None if len(states) == len(shapes) and all(map(fits, states, shapes)) else MISFIT

    def _short_cut(self, input: Tensor | PackedSequence, states: States | None) -> tuple[Tensor, ...] | None:
        """[output, *final states] of a dense batch, or None: go the whole way instead.

        That way takes 20 us of Python, as long as the kernels of a short call, and 200 us after kernels that
        have driven Python out of the caches: 7 % of an RNN's forward at H = 256, B = 32.
        """
        L = self.num_layers
        plain = (
            type(input) is Tensor
            and not isinstance(states, Tensor)
            and (input.is_cpu or input.is_cuda)
            and (L == 1 or not support.on_gpu(input))  # there several layers have a pipeline
            and input.dim() == 3
            and input.numel() > 0
        )
        if not plain or (L > 1 and self.dropout and self.training) or not support.is_plain_call():
            return None
        cell, batch_first, parameters = self._cell(), self.batch_first, self._parameters
        x = input.transpose(0, 1) if batch_first else input
        try:
            weights, packs = self._flat_weights, None
            if len(weights) > len(parameters) or not all(map(is_, weights, parameters.values())):
                weights = self._weights()  # which takes five times as long to see that nothing has changed
            if self._prepacked is not None:
                packs = self._fresh_packs()
            if states is None:
                states = stack.zeros(cell, self, x.size(1), x, weights)
            if L == 1:
                y, *finals = self._layer(cell, x, states, weights, packs[0] if packs else None)
            else:
                packs = packs or [None] * L
                y, finals, _ = stack.in_turn(
                    lambda i, x, states, weights: self._layer(cell, x, states, weights, packs[i]),
                    x,
                    *stack.by_layer(self, states, weights),
                )
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return None  # the whole way finds out why, and what to do
        return transpose(y, 0, 1) if batch_first else y, *finals[: cell.states]

    def _layer(
        self, cell: stack.Cell, x: Tensor, states: States, weights: Sequence[Tensor], pack: Tensor | None
    ) -> Sequence[Tensor]:
        if torch.is_grad_enabled():
            layer = stack.native_layer(cell, self, False)
            return layer(x, *states, weights, panels=pack, bidirectional=self.bidirectional)
        return cell.native(x, *states, weights, None, None, pack, self.bidirectional, *cell.flags)

    def _run(
        self,
        input: Tensor | PackedSequence,
        states: States | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        return_cells: bool = False,
    ) -> tuple[list[Tensor | PackedSequence], States]:
        """[output] or [output, cells], and the final states."""
        packed = isinstance(input, PackedSequence)
        x, batch_sizes, order, inverse = input if packed else (input, None, None, None)
        extras = lengths is not None or resets is not None or return_cells
        batch_dim = 0 if self.batch_first else 1
        unbatched = not packed and x.dim() == 2
        if unbatched:
            lengths = _of_one_row("lengths", lengths, [], 0)
            resets = _of_one_row("resets", resets, [x.size(0)], batch_dim)
            x = x.unsqueeze(batch_dim)
            states = None if states is None else [s.unsqueeze(1) for s in states]
        if order is not None and states is not None:
            states = [s.index_select(1, order) for s in states]
        outputs, states = stack.run(
            self._cell(),
            self,
            x,
            states,
            self._weights(),
            batch_sizes=batch_sizes,
            lengths=lengths,
            resets=resets,
            prepacked=self._fresh_packs(),
            return_cells=return_cells,
            why_torch=support.why_torch(x) if extras else None,
        )
        if inverse is not None:
            states = [s.index_select(1, inverse) for s in states]
        if packed:
            outputs = [PackedSequence(o, batch_sizes, order, inverse) for o in outputs]
        elif unbatched:
            outputs, states = [o.squeeze(batch_dim) for o in outputs], [s.squeeze(1) for s in states]
        return outputs, states

    def prepack_(self) -> "Self":
        """Pack frozen weights for the kernels, once, so that calls need not. Returns self.

        The packs serve calls that want no gradients, outside autocast and torch.compile. A call that wants
        gradients of the weights drops them; so do `unprepack_()`, `.to()`, load_state_dict, and any change
        of a weight that torch's version counter sees. Writing into `weight.data`, or into weights made in
        inference mode, or by an optimizer with fused=True, is not seen: unprepack first.
        Copies and pickles of the module are without packs. Raises RuntimeError for weights on meta.
        """
        weights = self._weights()
        if any(w.is_meta for w in weights):
            raise RuntimeError(
                "prepack_ needs weights that hold numbers, got weights on meta: load them first"
            )
        per_layer = len(weights) // self.num_layers
        gates, bidirectional = self._cell().gates, self.bidirectional
        with torch.no_grad():
            rows = [w.contiguous() for w in weights]
            packs = [
                torch.ops.seqkernels.pack_weights(rows[i : i + per_layer], gates, bidirectional)
                for i in range(0, len(weights), per_layer)
            ]
        # The alias keeps the memory: nothing else can come to lie where _version() says that the weight lies.
        self._prepacked = [(w, _version(w), w.detach()) for w in weights], packs
        return self

    def unprepack_(self) -> "Self":
        """Forget what `prepack_` made. Returns self."""
        self._prepacked = None
        return self

    def _fresh_packs(self) -> list[Tensor] | None:
        prepacked = self._prepacked  # read once: another thread may drop them
        if prepacked is None or support.is_compiling():
            return None
        packed_from, packs = prepacked
        trains = torch.is_grad_enabled() and any(w.requires_grad for w in self._flat_weights)
        same = all(
            w is was and _version(w) == version
            for w, (was, version, _) in zip(self._flat_weights, packed_from, strict=True)
        )
        if trains or not same:
            self.unprepack_()
            return None
        return packs

    def _apply(self, fn, recurse=True):
        self.unprepack_()
        return super()._apply(fn, recurse)

    def __getstate__(self):
        state = super().__getstate__()
        state.pop("_prepacked", None)
        return state


class OfOneState(Recurrent):
    """GRU and RNN."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """output and h_n; arguments: see the class."""
        extras = lengths is not None or resets is not None
        states = None if hx is None else (hx,)
        if not extras and (short := self._short_cut(input, states)):
            return short
        if isinstance(input, Proxy):
            return as_one_node(self, input, hx, lengths=lengths, resets=resets)
        if reason := self._why_torch(input, states, extras):
            return leave_to_torch(self, input, hx, reason, extras)
        (output,), (h_n,) = self._run(input, states, lengths, resets)
        return output, h_n


def _version(weight: Tensor) -> list[int]:
    """Changes with the contents, and where they lie: `weight.data = other` counts as no new version."""
    return [0 if weight.is_inference() else weight._version, weight.data_ptr()]


def _of_one_row(name: str, extra: Tensor | None, shape: list[int], batch_dim: int) -> Tensor | None:
    """What comes with an unbatched input of the given shape, as that of a batch of one row."""
    if not isinstance(extra, Tensor):
        return extra  # None, or what `stack.run` refuses
    if list(extra.shape) != shape:
        raise ValueError(f"{name} of an unbatched input must have the shape {shape}, got {list(extra.shape)}")
    return extra.unsqueeze(batch_dim)


def leave_to_torch(
    module: RNNBase | RNNCellBase, input: Tensor | PackedSequence, hx, reason: str, extras: bool = False
):
    """Where arguments do not fit together torch raises, in its own words, or can make sense of them."""
    if isinstance(input, PackedSequence):  # torch.nn.LSTM leaves this out and computes with what it gets
        module.check_input(input.data, input.batch_sizes)
        if hx is not None:
            module.check_forward_args(input.data, hx, input.batch_sizes)
    if reason == support.GRADIENTS_IN_A_GRAPH and isinstance(module, RNNBase):
        weights = [getattr(module, name) for name in module._flat_weights_names]
        if not all(isinstance(w, torch.nn.Parameter) for w in weights):  # but what functional_call was given
            torch._dynamo.graph_break()  # as at torch's layers: their gradients of weights cannot be traced
    result = module._torch.forward(module, input, hx)
    if extras:
        raise ValueError(
            f"lengths=, resets= and return_cell_states= are unknown to torch, which runs: {reason}"
        )
    support.fall_back(reason)
    return result


def step(cell: RNNCellBase, op: Callable, input: Tensor, hx, states: States | None, *options: str):
    """`cell(input, hx)` by `op`. states: hx as a sequence, or None."""
    if isinstance(input, Proxy):
        return as_one_node(cell, input, hx)
    if isinstance(states, (tuple, list)) and input.dim() == 2 and support.is_plain_call():
        try:
            return op(input, *states, *_cell_weights(cell), *options)
        except (AttributeError, RuntimeError, TypeError):
            pass  # the rest finds out why, and what to do
    fits = isinstance(input, Tensor) and input.dim() in (1, 2) and not isinstance(states, Tensor)
    fits = fits and (states is None or all(isinstance(s, Tensor) for s in states))
    reason = support.why_torch(input) if fits else MISFIT
    if reason:
        return leave_to_torch(cell, input, hx, reason)
    count = 2 if isinstance(cell, torch.nn.LSTMCell) else 1
    unbatched = input.dim() == 1
    x = input.unsqueeze(0) if unbatched else input
    if states is None:
        states = [x.new_zeros(x.size(0), cell.hidden_size)] * count
    elif unbatched:
        states = [s.unsqueeze(0) for s in states]
    weights, out_dtype = _cell_weights(cell), None
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = out_dtype = torch.get_autocast_dtype(x.device.type)
        if not isinstance(cell, torch.nn.RNNCell):
            out_dtype = blended(dtype, states[-1])
        x, *states = autocast(dtype, x, *states)
        weights = autocast_weights(dtype, *weights)
    try:
        new = op(x, *states, *(None if w is None else w.contiguous() for w in weights), *options)
    except (RuntimeError, TypeError) as error:
        refusal = str(error).rpartition("seqkernels::")[2]
    else:
        new = [s.squeeze(0) if unbatched else s for s in (new if count == 2 else (new,))]
        if out_dtype is not None:  # a program would insist on what it was cast from
            new = [s.to(out_dtype) for s in new]
        return tuple(new) if count == 2 else new[0]
    return leave_to_torch(cell, input, hx, refusal)


def _cell_weights(cell: RNNCellBase) -> Sequence[Tensor | None]:
    parameters = cell._parameters
    try:  # Module.__getattr__ takes 0.5 us each, which shows at B = 1
        return parameters["weight_ih"], parameters["weight_hh"], parameters["bias_ih"], parameters["bias_hh"]
    except KeyError:  # weight_norm, parametrizations and their kin put a tensor where the parameter was
        return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
