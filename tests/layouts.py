"""Tensors that lie where kernels do not look for them."""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def apart(values):
    """The same numbers, none beside another."""
    return pytree.tree_map_only(Tensor, lambda t: torch.stack([t, t], -1)[..., 0], values)
