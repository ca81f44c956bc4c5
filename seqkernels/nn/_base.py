"""What the drop-in modules share. Constructors, parameters and pickling are those of torch's own modules.

LSTM, GRU and RNN derive from RNNBase and not from torch.nn.LSTM and its kin, because torch.compile breaks the
graph at every instance of those.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from seqkernels import stack, support

States = Sequence[Tensor]


def torchs_twin(module: Module) -> Module:
    """What torch.jit.script compiles, and puts in the place of `module` in the model that it compiles."""
    support.fall_back(
        "torch.jit.script knows torch's operators only, and puts torch's module in the place of ours"
    )
    twin = module._torch.__new__(module._torch)
    twin.__dict__.update(module.__dict__)
    return twin


class Recurrent(RNNBase):
    """Layers of one kind of cell. Serves as the `stack.Config` of its own call."""

    recompute = False
    _prepacked: tuple[list[tuple[Tensor, int]], list[Tensor]] | None = None

    _torch: type[RNNBase]

    __prepare_scriptable__ = torchs_twin

    def _cell(self) -> stack.Cell:
        raise AssertionError("a subclass says which cell")

    def _run(
        self,
        input: Tensor | PackedSequence,
        states: States | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        return_cells: bool = False,
    ) -> tuple[list[Tensor | PackedSequence], States] | None:
        """[output] or [output, cells], and the final states; None if the arguments do not fit together."""
        self._update_flat_weights()
        packed = isinstance(input, PackedSequence)
        x, batch_sizes, order, inverse = input if packed else (input, None, None, None)
        batch_dim = 0 if self.batch_first else 1
        unbatched = not packed and x.dim() == 2
        if unbatched:
            x = x.unsqueeze(batch_dim)
            states = states and [s.unsqueeze(1) for s in states]
            lengths = None if lengths is None else lengths.unsqueeze(0)
            resets = None if resets is None else resets.unsqueeze(batch_dim)
        if order is not None:
            states = states and [s.index_select(1, order) for s in states]
        if not self._fits(x, states, batch_sizes):
            return None
        outputs, states = stack.run(
            self._cell(),
            self,
            x,
            states,
            self._flat_weights,
            batch_sizes=batch_sizes,
            lengths=lengths,
            resets=resets,
            prepacked=self._fresh_packs(),
            return_cells=return_cells,
        )
        if inverse is not None:
            states = [s.index_select(1, inverse) for s in states]
        if packed:
            outputs = [PackedSequence(o, batch_sizes, order, inverse) for o in outputs]
        elif unbatched:
            outputs, states = [o.squeeze(batch_dim) for o in outputs], [s.squeeze(1) for s in states]
        return outputs, states

    def _fits(self, x: Tensor, states: States | None, batch_sizes: Tensor | None) -> bool:
        weight = self._flat_weights[0]
        casts = torch.is_autocast_enabled(x.device.type)
        if x.dim() != (3 if batch_sizes is None else 2) or x.size(-1) != self.input_size:
            return False
        if x.device != weight.device or not (casts or x.dtype == weight.dtype):
            return False
        if states is None:
            return True
        L = self.num_layers * (2 if self.bidirectional else 1)
        B = int(batch_sizes[0]) if batch_sizes is not None else x.size(0 if self.batch_first else 1)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: self._cell().states]
        return len(states) == len(sizes) and all(
            s.shape == (L, B, size) and s.device == x.device and (casts or s.dtype == x.dtype)
            for s, size in zip(states, sizes, strict=True)
        )

    def prepack_(self):
        """Pack frozen weights for the kernels, once, so that calls need not. Returns self.

        The packs serve calls that want no gradients, outside autocast and torch.compile. A call that wants
        gradients of the weights drops them; so do `unprepack_()`, `.to()`, load_state_dict, and any change
        of a weight that torch's version counter sees. Writing to `weight.data` is not seen: unprepack first.
        Copies and pickles of the module are without packs.
        """
        self._update_flat_weights()
        weights, per_layer = self._flat_weights, len(self._flat_weights) // self.num_layers
        gates, bidirectional = self._cell().gates, self.bidirectional
        with torch.no_grad():
            packs = [
                torch.ops.seqkernels.rnn_pack(weights[i : i + per_layer], gates, bidirectional)
                for i in range(0, len(weights), per_layer)
            ]
        self._prepacked = [(w, _version(w)) for w in weights], packs
        return self

    def unprepack_(self):
        """Forget what `prepack_` made. Returns self."""
        self._prepacked = None
        return self

    def _fresh_packs(self) -> list[Tensor] | None:
        if self._prepacked is None or torch.compiler.is_compiling():
            return None
        packed_from, packs = self._prepacked
        trains = torch.is_grad_enabled() and any(w.requires_grad for w in self._flat_weights)
        same = all(
            w is was and _version(w) == version
            for w, (was, version) in zip(self._flat_weights, packed_from, strict=True)
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


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def step(cell: RNNCellBase, op: Callable, count: int, input: Tensor, hx, *options: str):
    """`cell(input, hx)` by `op`, for a cell that has `count` states."""
    if reason := support.why_torch(input):
        support.fall_back(reason)
        return cell._torch.forward(cell, input, hx)
    weights = _cell_weights(cell)
    unbatched = input.dim() == 1
    x = input.unsqueeze(0) if unbatched else input
    if hx is None:
        states = [x.new_zeros(x.size(0), cell.hidden_size)] * count
    else:
        states = [hx] if count == 1 else hx
        if unbatched:
            states = [s.unsqueeze(0) for s in states]
    out_dtype = None
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtype = out_dtype = torch.get_autocast_dtype("cpu")
        if not isinstance(
            cell, torch.nn.RNNCell
        ):  # torch blends the old state, of its own dtype, into the new one
            out_dtype = torch.promote_types(dtype, states[-1].dtype)
        x, states = x.to(dtype), [s.to(dtype) for s in states]
        weights = [None if w is None else w.to(dtype) for w in weights]
    shape, dtype = (x.size(0), cell.hidden_size), weights[0].dtype
    fits = x.shape == (shape[0], cell.input_size) and x.dtype == dtype and len(states) == count
    if not fits or not all(s.shape == shape and s.dtype == dtype and s.is_cpu for s in states):
        return leave_to_torch(cell, input, hx)
    new = op(x, *states, *weights, *options)
    if count == 1:
        new = (new,)
    if unbatched:
        new = [s.squeeze(0) for s in new]
    if out_dtype is not None:
        new = [s.to(out_dtype) for s in new]
    return new[0] if count == 1 else tuple(new)


def leave_to_torch(module: RNNBase | RNNCellBase, input: Tensor | PackedSequence, hx, *beyond_torch: object):
    """For arguments that do not fit together: torch raises in its own words, or makes sense of them."""
    result = module._torch.forward(module, input, hx)
    if any(argument is not None for argument in beyond_torch):
        raise ValueError("lengths= and resets= need input, hx and weights of one dtype")
    support.fall_back("input, hx and weights differ in dtype")
    return result


def _cell_weights(cell: RNNCellBase) -> Sequence[Tensor | None]:
    parameters = cell._parameters
    try:  # much faster than Module.__getattr__, which shows at B = 1
        return [parameters[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    except KeyError:  # weight_norm, parametrizations and their kin put a tensor where the parameter was
        return [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
