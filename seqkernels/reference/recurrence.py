"""The walk over time that all three reference cells share: the plain truth, one torch op at a time."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Sequence[Tensor]], State]


def recurrence(
    cell: Cell,
    x: Tensor,
    initial: State,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    bidirectional: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs `cell` over x [T,B,I], or over packed x [N,I] with batch_sizes [T].

    initial: per state kind one tensor [D,B,S]. Returns per state kind the states of all steps, [T,B,D*S] or
    [N,D*S], and the final states [D,B,S].
    """
    batch = initial[0].size(1)
    sizes = [batch] * x.size(0) if batch_sizes is None else batch_sizes.tolist()
    rows = x.flatten(0, 1) if batch_sizes is None else x
    starts = [0, *accumulate(sizes)]
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // directions

    all_steps, finals = [], []
    for direction in range(directions):
        w = weights[direction * per_direction : (direction + 1) * per_direction]
        start = tuple(s[direction] for s in initial)
        state, steps = start, [start] * len(sizes)
        for t in reversed(range(len(sizes))) if direction else range(len(sizes)):
            n = sizes[t]
            before = tuple(s[:n] for s in state)
            if resets is not None:
                reset = resets[t, :n, None]
                before = tuple(torch.where(reset, s0[:n], s) for s0, s in zip(start, before, strict=True))
            steps[t] = cell(rows[starts[t] : starts[t + 1]], before, w)
            # Rows that have ended, or in the reverse direction not yet begun, keep their state.
            state = tuple(torch.cat([new, old[n:]]) for new, old in zip(steps[t], state, strict=True))
        all_steps.append([torch.cat(kind) for kind in zip(*steps, strict=True)])
        finals.append(state)

    outputs = [torch.cat(kind, dim=1) for kind in zip(*all_steps, strict=True)]
    if batch_sizes is None:
        outputs = [o.unflatten(0, (x.size(0), batch)) for o in outputs]
    return outputs, [torch.stack(kind) for kind in zip(*finals, strict=True)]


def split_weights(weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """One direction in torch's order -> w_ih, w_hh, b_ih, b_hh, w_hr; the last three may be absent."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if len(rest) >= 2 else (None, None)
    return w_ih, w_hh, b_ih, b_hh, rest[-1] if len(rest) % 2 else None
