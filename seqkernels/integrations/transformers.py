"""Hugging Face models on our kernels: after `register()` they take attn_implementation="seqkernels".

Models make one mask and hand it to the attention of every layer. Ours is no larger than the padding it says,
[B,keys], where what else a query may not see is causal; attention knows it by its two dims of bool.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)
from transformers.utils import is_tracing, logging

from seqkernels import support
from seqkernels.attention import attend_with_lengths

logger = logging.get_logger(__name__)

# Keywords that models of sparse or otherwise changed attention pass to any attention but "eager" and "sdpa".
UNKNOWN = ("indices", "block_indices", "sinks")

# Models that cut the mask to the newest queries, or to the keys there are: it has to have them.
CUTTING = ("gemma4_text", "gemma4_unified_text", "pix2struct_text_model")


def register(name: str = "seqkernels") -> None:
    """Make `attn_implementation=name` known to transformers, to `model.set_attn_implementation(name)`, too.

    Padding on the right becomes lengths. Softcap, sinks and position biases are supported. Attention weights
    are not, as with "sdpa". A model that hands over which keys to attend to (DeepSeek-V3.2 and its kin)
    raises ValueError. Models that do not take their attention from transformers' registry keep it: BLOOM and
    its kin say so and run as with "eager", Falcon and GPT-J raise KeyError. `seqkernels.patch()` reaches them
    where they have "sdpa".
    Equal to `attn_implementation="sdpa"`.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query [B,Hq,Tq,D], key and value [B,H,Tk,D] -> [B,Tq,Hq,D]"""
    if unknown := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        names = ", ".join(unknown)
        raise ValueError(
            f"{type(module).__name__} hands {names} to its attention, which seqkernels does not know"
        )
    if kwargs.get("output_attentions"):
        logger.warning_once("seqkernels has no attention weights for output_attentions=True: only eager has")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.size(0) != key.size(0):  # learned queries come once for all rows
        rows = torch.broadcast_shapes(query.shape[:1], key.shape[:1])
        query, key = (t.expand(*rows, -1, -1, -1) for t in (query, key))
    lengths = _lengths_of_keys(attention_mask)
    padding = attention_mask is not None and attention_mask.dim() == 2 and attention_mask.dtype == torch.bool
    # Moonshine takes any mask to say what is causal, as others do, and then says that nothing is
    is_causal = bool((padding or (is_causal and attention_mask is None)) and query.size(2) > 1)
    mask = attention_mask[:, None, None] if padding else attention_mask
    if lengths is not None:
        mask = None
    if position_bias is not None:
        if mask is None:
            mask = position_bias
        elif mask.dtype == torch.bool:
            mask = position_bias.masked_fill(~mask, -torch.inf)
        else:
            mask = position_bias + mask
    out, _ = attend_with_lengths(
        query,
        key,
        value,
        mask,
        lengths=lengths,
        is_causal=is_causal,
        bottom_right=padding and lengths is None,
        dropout_p=dropout,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.transpose(1, 2), None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: PreTrainedConfig | None = None,
    **kwargs,
) -> Tensor | None:
    """The padding [B,keys], or [B,1,1,keys] where nothing is causal; for anything else what "sdpa" takes.

    All that "sdpa" or "eager" takes for models that know nothing else.
    """
    only_eager = config is not None and _know_only_eager(type(config))
    if only_eager or (config is not None and config.model_type in CUTTING):
        allow_is_causal_skip = allow_is_bidirectional_skip = False
    causal = mask_function is causal_mask_function and allow_is_causal_skip and q_length > 1
    free = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip
    if (
        attention_mask is None
        or not _values_may_decide(attention_mask)
        or attention_mask.shape != (batch_size, kv_length)
        or not (free or (causal and isinstance(q_offset, int) and q_offset + q_length == kv_length))
        or attention_mask.all()
    ):
        return (eager_mask if only_eager else sdpa_mask)(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )
    mask = (attention_mask[:, None, None] if free else attention_mask).clone()  # may be the caller's own
    if attention_mask.is_cpu and (free or q_length == kv_length):
        lengths, keys = attention_mask.sum(1), torch.arange(kv_length, device="cpu")
        if torch.equal(attention_mask, keys < lengths[:, None]):
            mask._lengths_of_keys = lengths, _version(mask)
    return mask


def _know_only_eager(config: type[PreTrainedConfig]) -> bool:
    """Models that attend by themselves, or do not say what is causal since the masks of "eager" always do."""
    name = config.__module__.replace(".configuration_", ".modeling_")
    found = vars(sys.modules[name]).values() if name != config.__module__ and name in sys.modules else ()
    models = [c for c in found if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    models = [c for c in models if c.__module__ == name]
    if own := [c.__name__ for c in models if not c._can_set_attn_implementation()]:
        support.fall_back(f"{own[0]} does not take its attention from transformers' registry")
        return True
    return bool(models) and not any(c._supports_sdpa or c._supports_attention_backend for c in models)


_know_only_eager._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _values_may_decide(mask: Tensor) -> bool:
    """A tracer would keep what they decide for all others, and a fake tensor has none."""
    return support.is_eager() and not is_tracing(mask) and not support.is_dispatched()


def _lengths_of_keys(mask: Tensor | None) -> Tensor | None:
    """What `make_mask` found, if the mask still says so: a tracer would not ask again."""
    if not support.is_eager() or not hasattr(mask, "_lengths_of_keys"):
        return None
    lengths, version = mask._lengths_of_keys
    return lengths if version == _version(mask) else None


def _version(mask: Tensor) -> int:
    return 0 if mask.is_inference() else mask._version
