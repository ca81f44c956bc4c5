"""Who is compared, on the same weights and inputs: torch.nn, the same module after swap_, ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels

from . import attention
from .attention import AttentionCase, AttentionProblem
from .cases import Case
from .segments import Segments

OURS, TORCH, ORT = "seqkernels", "torch", "onnxruntime"


@dataclass
class Problem:
    """One case as tensors. The weights are those of `module`; everybody gets copies of them."""

    case: Case
    module: nn.Module
    x: Tensor | PackedSequence
    hx: tuple[Tensor, ...]
    dy: Tensor  # gradient of the output sequence
    resets: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same rounded numbers in another dtype."""
        hx = tuple(state.to(dtype) for state in self.hx)
        module = copy.deepcopy(self.module).to(dtype)
        return Problem(self.case, module, self.x.to(dtype), hx, self.dy.to(dtype), self.resets)


@dataclass
class Contestant:
    run: Callable[[], Any]  # this is timed
    outputs: Callable[[Any], dict[str, Tensor]]  # its result with names, the same names for every contestant
    room: float = 1.0  # times the usual error is allowed, for one that computes less exactly on purpose


def make_problem(case: Case | AttentionCase) -> Problem | AttentionProblem:
    if isinstance(case, AttentionCase):
        return attention.make_problem(case)
    generator = torch.Generator(case.device).manual_seed(case.T + 31 * case.B + 997 * case.H)
    name = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}[case.cell] + ("Cell" if case.step else "")
    options = {} if case.step else {"num_layers": case.layers, "bidirectional": case.bidirectional}
    module = getattr(nn, name)(case.I, case.H, **options, device=case.device)
    dtype = getattr(torch, case.dtype)
    with torch.no_grad():
        for weight in module.parameters():
            weight.uniform_(-(case.H**-0.5), case.H**-0.5, generator=generator)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device).to(dtype)

    rows = (case.B,) if case.step else (case.layers * case.directions, case.B)
    hx = tuple(random(*rows, case.H) for _ in range(2 if case.cell == "lstm" else 1))
    x: Tensor | PackedSequence = random(case.B, case.I) if case.step else random(case.T, case.B, case.I)
    if case.fill is not None:
        x = pack_padded_sequence(x, torch.tensor(case.lengths))
    dy_rows = (case.B,) if case.step else (case.tokens,) if case.fill is not None else (case.T, case.B)
    dy, resets = random(*dy_rows, case.H * case.directions), None
    if case.resets is not None:
        resets = torch.rand(case.T, case.B, generator=generator, device=case.device) < case.resets
    return Problem(case, module.to(dtype).train(case.mode == "train"), x, hx, dy, resets)


def torch_contestant(problem: Problem | AttentionProblem) -> Contestant:
    if isinstance(problem, AttentionProblem):
        return Contestant(*attention.runner(problem, ours=False))
    call = None if problem.resets is None else Segments(problem.resets).call(problem.module)
    return _module_contestant(problem, problem.module, call)


def seqkernels_contestant(problem: Problem | AttentionProblem) -> Contestant:
    if isinstance(problem, AttentionProblem):
        return Contestant(*attention.runner(problem, ours=True))
    holder = nn.Sequential(copy.deepcopy(problem.module))
    seqkernels.swap_(holder)
    module = holder[0]
    if not type(module).__module__.startswith("seqkernels"):
        raise RuntimeError("swap_ left the module as it was: torch would be compared with itself")
    if problem.case.recompute:
        module.recompute = True
    call = None if problem.resets is None else partial(module, resets=problem.resets)
    return _module_contestant(problem, module, call)


def onnxruntime_contestant(problem: Problem) -> Contestant:
    from .onnx_graph import session_call

    case, x, hx = problem.case, problem.x, problem.hx
    if case.step:
        x, hx = x[None], tuple(state[None] for state in hx)

    def outputs(result: Any) -> dict[str, Tensor]:
        y, *states = (torch.from_numpy(value) for value in result)
        if case.step:
            return dict(zip(("h", "c"), (state[0] for state in states), strict=False))
        if case.fill is not None:
            y = pack_padded_sequence(y, torch.tensor(case.lengths)).data
        return dict(zip(("y", "hn", "cn"), (y, *states), strict=False))

    return Contestant(session_call(case, problem.module, x, hx), outputs)


CONTESTANTS: dict[str, Callable[[Any], Contestant]] = {
    OURS: seqkernels_contestant,
    TORCH: torch_contestant,
    ORT: onnxruntime_contestant,
}


def contestants_for(case: Case | AttentionCase) -> list[str]:
    """ONNX Runtime takes part in float32 inference of recurrent modules when it is installed."""
    if isinstance(case, AttentionCase):
        return [OURS, TORCH]
    fits = case.mode == "forward" and case.dtype == "float32" and case.resets is None
    return [OURS, TORCH, ORT] if fits and find_spec("onnxruntime") and find_spec("onnx") else [OURS, TORCH]


def _module_contestant(
    problem: Problem, module: nn.Module, call: Callable[..., Any] | None = None
) -> Contestant:
    """`call` stands for the module where that alone does not compute the case."""
    case, x, hx, call = problem.case, problem.x, problem.hx, call or module
    state = hx if case.cell == "lstm" else hx[0]

    def flatten(result: Any) -> tuple[Tensor, ...]:
        """(h, c) or (h,) of a cell; (y, hn, cn) or (y, hn) of a module over time."""
        if case.step:
            return result if case.cell == "lstm" else (result,)
        y, states = result
        y = y.data if isinstance(y, PackedSequence) else y
        return (y, *states) if case.cell == "lstm" else (y, states)

    def named(values: tuple[Tensor, ...]) -> dict[str, Tensor]:
        names = ("h", "c") if case.step else ("y", "hn", "cn")
        return {name: value.detach() for name, value in zip(names, values, strict=False)}

    if case.mode == "forward":
        return Contestant(lambda: call(x, state), lambda result: named(flatten(result)))

    leaf = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
    x = x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf
    wanted = {"grad x": leaf} | {f"grad {name}": weight for name, weight in module.named_parameters()}

    def train() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        values = flatten(call(x, state))
        return values, torch.autograd.grad(values[0], list(wanted.values()), problem.dy)

    def outputs(result: Any) -> dict[str, Tensor]:
        values, gradients = result
        return named(values) | dict(zip(wanted, gradients, strict=True))

    return Contestant(train, outputs)
