"""Layers of a stack at the same time: layer l runs a chunk of time while layer l - 1 runs the next one.

Persistent kernels often have far fewer blocks than a GPU has multiprocessors. Each layer has a CUDA stream,
or shares one. Autograd runs every node on the stream of its forward, so that backward is pipelined too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, cuda

from seqkernels import support
from seqkernels.ops import _autograd as ag

States = Sequence[Tensor]

# While a GPU runs 64 steps, of 1.4 us or more on an H100, the host issues the next chunk of a layer in some
# 30 us (computed). A chunk of two layers, 128 steps, takes 180 us or more, and reads its weights again.
STEPS_PER_LAYER = 64
# Of two layers 16 take 53 % of the time, where more would end at 50 %; each adds a rounding to the gradients
# of the weights.
MAX_CHUNKS = 16

cuda_plan = torch.ops.seqkernels.cuda_plan.default
cuda_blocks = torch.ops.seqkernels.cuda_blocks.default


@dataclass(frozen=True)
class Plan:
    steps: int  # of a chunk; the last has the rest
    chunks: int
    streams: int

    def __str__(self) -> str:
        return f"pipelined in {self.chunks} chunks on {self.streams} streams"


def plan(
    x: Tensor, states: States, weights: Sequence[Tensor], gates: int, layers: int, simple: bool
) -> Plan | None:
    """For x [T,B,I] and all layers' states and weights; None: one layer after the other.

    simple: one direction, all rows of the same length, no resets. A reset goes back to the initial state, and
    a kernel would take that of its chunk for it.
    """
    if layers == 1 or not (simple and support.on_gpu(x) and type(x) is Tensor and support.is_eager()):
        return None
    H, P = weights[0].size(0) // gates, weights[1].size(1)
    if H != P:
        return None
    return fit(x, gates, x.size(0), x.size(1), H, layers, ag.needs_grad(x, *states, *weights))


def fit(x: Tensor, gates: int, T: int, B: int, H: int, layers: int, gradients: bool) -> Plan | None:
    """The plan of a simple call without projections, on the device of x and of its dtype."""
    chunks = min(T // (STEPS_PER_LAYER * layers), MAX_CHUNKS)
    if chunks < 2:
        return None
    blocks = cuda_blocks(x, gates, B, H, 1, False)[: 2 if gradients else 1]
    if not all(blocks):  # stepwise
        return None
    multiprocessors = cuda.get_device_properties(x.device).multi_processor_count
    streams = min(layers, multiprocessors // max(blocks))
    return Plan(-(-T // chunks), chunks, streams) if streams > 1 else None


def run(
    layer: Callable[..., Sequence[Tensor | None]],
    plan: Plan,
    x: Tensor,
    states: Sequence[States],
    weights: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, list[States], list[Tensor]]:
    """layer(l, x, states, weights) -> [y, *states, *cells]: y and cells of the last layer, all final states.

    Layer 0 waits for the current stream, a chunk for the same one of the layer before, the current stream for
    the last chunk of the last layer: all others come before that. Memory belongs to the stream that allocated
    it; where another one uses it, it is recorded there, which holds for as long as it is in use, by autograd
    too. Of gradients autograd records it: what leaves backward does so through views of x, states and
    weights, nodes of the current stream.
    """
    current = cuda.current_stream(x.device)
    streams = _streams_beside(current, plan.streams)
    finals, weights = list(states), list(weights)
    chunks, done = list(x.split(plan.steps)), {}
    outputs = []
    streams[0].wait_stream(current)
    _record(streams[0], x)
    for i, j in sorted(product(range(len(states)), range(len(chunks))), key=sum):
        stream = streams[i % len(streams)]
        if i > 0:
            stream.wait_event(done.pop(j))
            _record(stream, chunks[j])
        if j == 0:
            weights[i] = [w.view_as(w) for w in weights[i]]
            _record(stream, *states[i], *weights[i])
        with cuda.stream(stream):
            chunks[j], *rest = layer(i, chunks[j], finals[i], weights[i])
        finals[i], cells = rest[: len(states[i])], rest[len(states[i]) :]
        done[j] = stream.record_event()
        if i + 1 == len(states):
            outputs.append([t for t in (chunks[j], *cells) if t is not None])
    current.wait_stream(stream)
    for tensors in (*finals, *outputs):
        _record(current, *tensors)
    y, *cells = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return y, finals, cells


def _record(stream: cuda.Stream, *tensors: Tensor | None) -> None:
    for t in tensors:
        if t is not None:
            t.record_stream(stream)


POOL = 32  # streams of a GPU that torch hands out in turn
_families: dict[cuda.Stream, list[cuda.Stream]] = {}
_drawn: set[torch.device] = set()  # whose streams are all of a family


def _streams_beside(current: cuda.Stream, count: int) -> list[cuda.Stream]:
    """The same ones for every call on the current stream, so that they use their memory again.

    A checkpoint computes forward again on one of them, amid backward: it gets the family that this one is
    of, and backward finds each tensor on the stream that uses it. So no stream is of two families; where
    torch has no more of its own, there are fewer than asked for, or the current one alone.
    """
    family = _families.setdefault(current, [])
    tries = 0 if current.device in _drawn else POOL
    while len(family) < count and tries > 0:
        stream, tries = cuda.Stream(current.device), tries - 1
        if stream not in _families:
            _families[stream], tries = family, POOL
            family.append(stream)
        elif tries == 0:
            _drawn.add(current.device)
    return family[:count] or [current]
