"""What our operators compute, for torch.utils.flop_counter.FlopCounterMode, which knows torch's alone.

seqkernels.integrations.flop_counter.register()
"""

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

import seqkernels.ops  # noqa: F401  (defines torch.ops.seqkernels)


def register() -> None:
    """Make `FlopCounterMode` count what seqkernels computes; before, it counts 0 of it.

    As torch's formulas do, ours count the additions and multiplications of products only, and no fewer for
    a causal mask, a window or lengths of keys. Packed sequences and `varlen_attention` count what they hold.
    """
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.seqkernels, name)
        if operator not in flop_registry:
            register_flop_formula(operator, get_raw=True)(_by_name(operator, formula))


def _by_name(operator, formula: Callable[[SimpleNamespace], int]) -> Callable[..., int]:
    """The formula takes what the operator was given as attributes."""
    names = [argument.name for argument in operator.default._schema.arguments]

    def count(*args, out_val=None, **kwargs) -> int:
        return formula(SimpleNamespace(**dict(zip(names, args, strict=False)) | kwargs))

    return count


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _elements(weights: Iterable[Tensor]) -> int:
    """Of matrices: biases are no products."""
    return sum(w.numel() for w in weights if w.dim() == 2)


def _layer_fwd(a: SimpleNamespace) -> int:
    return 2 * _tokens(a.x) * _elements(a.weights)


def _layer_bwd(a: SimpleNamespace) -> int:
    """Each weight times gradients of gates, and these times what the weight was multiplied with."""
    per_direction = len(a.weights) // (2 if a.bidirectional else 1)
    left_out = 0 if a.need_dx else _elements(a.weights[::per_direction])
    return 2 * _tokens(a.x) * (2 * _elements(a.weights) - left_out)


def _cell_fwd(a: SimpleNamespace) -> int:
    return 2 * _tokens(a.x) * _elements((a.w_ih, a.w_hh))


def _linear_fwd(a: SimpleNamespace) -> int:
    return 2 * _tokens(a.x) * a.w.numel()


def _linear_bwd(a: SimpleNamespace) -> int:
    return sum(2 * _tokens(a.dy) * a.dy.size(1) * t.size(1) for t in (a.x, a.w) if t is not None)


def _pairs(a: SimpleNamespace) -> int:
    """Of a query and a key, in all heads."""
    if getattr(a, "cu_q", None) is None:
        return math.prod(a.q.shape[:3]) * a.k.size(2)
    if type(a.cu_q) is Tensor and not a.cu_q.is_meta:
        return a.q.size(1) * int((a.cu_q.diff() * a.cu_k.diff()).sum())
    return a.q.size(1) * (a.cu_q.size(0) - 1) * a.max_q * a.max_k  # nobody knows: the most it can be


def _attention_fwd(a: SimpleNamespace) -> int:
    return 2 * _pairs(a) * (a.q.size(3) + a.v.size(3))


def _attention_bwd(a: SimpleNamespace) -> int:
    """Scores again, dQ, dK; dP, dV."""
    return 2 * _pairs(a) * (3 * a.q.size(3) + 2 * a.v.size(3))


def _attention_weights(a: SimpleNamespace) -> int:
    return 2 * _pairs(a) * a.q.size(3)


def _paged_fwd(a: SimpleNamespace) -> int:
    keys = a.block_table.size(1) * a.k.size(2)
    return 2 * math.prod(a.q.shape[:3]) * keys * (a.q.size(3) + a.v.size(3))


def _additive_fwd(a: SimpleNamespace) -> int:
    """The tanh of each pair times w, weights times values."""
    return 2 * _tokens(a.q) * a.k.size(1) * (a.q.size(2) + a.v.size(2))


_FORMULAS: dict[str, Callable[[SimpleNamespace], int]] = {
    **{f"{kind}_layer_fwd": _layer_fwd for kind in ("lstm", "gru", "rnn")},
    **{f"{kind}_layer_bwd": _layer_bwd for kind in ("lstm", "gru", "rnn")},
    **{f"{kind}_cell_fwd": _cell_fwd for kind in ("lstm", "gru", "rnn")},
    "linear_fwd": _linear_fwd,
    "linear_bwd": _linear_bwd,
    "attention_fwd": _attention_fwd,
    "attention_bwd": _attention_bwd,
    "attention_weights": _attention_weights,
    "paged_attention_fwd": _paged_fwd,
    "additive_attention_fwd": _additive_fwd,
    "additive_attention_bwd": lambda a: 2 * _additive_fwd(a),
}
