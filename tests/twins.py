"""A torch module, ours with the same weights and torch's in float64, run alike, with or without gradients."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import seqkernels
from seqkernels import support

KINDS = ("LSTM", "GRU", "RNN")
Input = Tensor | PackedSequence


def twins(kind: str, *args, dtype: torch.dtype = torch.float32, **kwargs) -> tuple[nn.Module, nn.Module]:
    theirs = getattr(nn, kind)(*args, **kwargs).to(dtype)
    ours = getattr(seqkernels, kind)(*args, **kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(module: nn.Module, batch: int | None, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Random h_0, and c_0 for an LSTM; batch None for unbatched input."""
    weight = module.weight_ih_l0
    rows = () if batch is None else (batch,)
    n = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
    return tuple((scale * torch.randn(n, *rows, s)).to(weight.dtype) for s in sizes)


def cast(tensors, dtype: torch.dtype):
    """The same tensors, inputs of another dtype, as leaves."""
    if isinstance(tensors, PackedSequence):
        return PackedSequence(cast(tensors.data, dtype), *tensors[1:])
    if isinstance(tensors, tuple):
        return tuple(cast(t, dtype) for t in tensors)
    return tensors.detach().to(dtype)


def run(module: nn.Module, x: Input, hx: tuple[Tensor, ...] | None = None, grad: bool = False, **kwargs):
    """{"y", "h_n", "c_n"?, "cells"?}, and with grad the gradients of a random linear function of these.

    Its slopes are multiples of 1/4, exact in every dtype.
    """
    data = x.data if isinstance(x, PackedSequence) else x
    parameters = dict(module.named_parameters())
    leaves = {"x": data, **dict(zip(("h_0", "c_0"), hx or (), strict=False)), **parameters}
    with torch.set_grad_enabled(grad):
        for leaf in leaves.values():
            leaf.requires_grad_(grad)
        lstm = isinstance(module, nn.LSTM | seqkernels.LSTM)
        y, finals, *cells = module(x, hx if hx is None or lstm else hx[0], **kwargs)
        finals = finals if isinstance(finals, tuple) else (finals,)
        names = ("y", "h_n", "c_n")[: 1 + len(finals)]
        outputs = dict(zip(names, (y, *finals), strict=True)) | ({"cells": cells[0]} if cells else {})
        outputs = {n: o.data if isinstance(o, PackedSequence) else o for n, o in outputs.items()}
        if not grad:
            return outputs
        generator = torch.Generator().manual_seed(1)
        slopes = [torch.randint(-4, 5, o.shape, generator=generator) / 4 for o in outputs.values()]
        loss = sum((o.double() * s.to(o.device)).sum() for o, s in zip(outputs.values(), slopes, strict=True))
        grads = torch.autograd.grad(loss, list(leaves.values()))
    return outputs | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}


def run_exactly(module: nn.Module, x: Input, hx: tuple[Tensor, ...] | None, grad: bool = False, **kwargs):
    """`run` in float64 of the same module with the same, already rounded weights and inputs."""
    exact = copy.deepcopy(module).double()
    return run(exact, cast(x, torch.float64), None if hx is None else cast(hx, torch.float64), grad, **kwargs)


@contextmanager
def torch_instead() -> Iterator[None]:
    """Our modules do all by torch's own, or by the reference where torch has no arguments for it."""
    with mock.patch.object(support, "why_torch", return_value="a test wants it"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def chunk_by_chunk(module: nn.Module, steps: int) -> Iterator[None]:
    """All layers run a chunk of time before any runs the next, as pipelined ones do, but in turn."""

    def forward(x, hx=None):
        outputs = []
        for part in x.split(steps):
            y, hx = type(module).forward(module, part, hx)
            outputs.append(y)
        return torch.cat(outputs), hx

    with mock.patch.object(module, "forward", forward):
        yield
