"""Tensors that lie, or are, where kernels do not look for them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def apart(values):
    """The same numbers, none beside another."""
    return pytree.tree_map_only(Tensor, lambda t: torch.stack([t, t], -1)[..., 0], values)


def with_one_on_meta(args: tuple) -> Iterator[tuple]:
    """The arguments of an op, with each of the tensors in turn on the meta device."""
    leaves, spec = pytree.tree_flatten(args)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            yield pytree.tree_unflatten([*leaves[:i], leaf.to("meta"), *leaves[i + 1 :]], spec)
