"""MultiheadAttention: torch.nn's own constructor, parameters and errors, on the kernels of seqkernels."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from seqkernels import support
from seqkernels.attention import MISFIT, is_plain, torchs_kernels
from seqkernels.nn._base import as_one_node, project, torchs_twin
from seqkernels.ops.attention import NO_LIMIT, attention, attention_weights
from seqkernels.reference.attention import random_state


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, with the same constructor, parameters, state_dict, errors and results.

    Masks stay as small as they are given, weights come from a second pass: without, memory is O(L + S).
    dtypes: float32, float64 (on a GPU by torch), bfloat16, float16.
    A query whose keys are all masked gives 0, with need_weights too, where torch gives nan.
    Equal to `torch.nn.MultiheadAttention(...)(query, key, value, ...)`.
    """

    _torch = torch.nn.MultiheadAttention

    __prepare_scriptable__ = torchs_twin

    @property
    def _head_dim(self) -> int:
        """Of today's num_heads, as torch computes it."""
        return self.embed_dim // self.num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """output [L,N,E] ([N,L,E] if batch_first, [L,E] unbatched), and weights [N,L,S], of each head
        [N,heads,L,S] unless average_attn_weights, None unless need_weights; arguments: as torch's."""
        if isinstance(query, Proxy):
            options = need_weights, attn_mask, average_attn_weights, is_causal
            return as_one_node(self, query, key, value, key_padding_mask, *options)
        masks = key_padding_mask, attn_mask
        plain = is_plain(query, key, value, *masks)
        forbidden = support.forbids_flash()
        dropout = self.dropout if self.training else 0.0
        reason = support.why_torch_attends(query, self._head_dim)
        if plain and not reason and not self._fits(query, key, value, *masks, is_causal):
            reason = MISFIT
        if not 0 <= dropout <= 1:
            reason = f"dropout must be between 0 and 1, got {dropout}"
        if not (plain or reason or forbidden or need_weights) and self._fits_nested(
            query, key, value, *masks
        ):
            return self._forward_nested(query), None
        if reason or forbidden or not plain:
            options = need_weights, attn_mask, average_attn_weights, is_causal
            with torchs_kernels():
                result = self._torch.forward(self, query, key, value, key_padding_mask, *options)
            if plain and reason and not forbidden:
                support.fall_back(reason)
            return result

        unbatched = query.dim() == 2
        if unbatched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = self._heads(query, key, value)
        k, v = self._with_bias_and_zeros(k, v)
        more = k.size(2) - key.size(-2 if self.batch_first or unbatched else 0)
        # The hint replaces the mask where it does so in torch, and where both are seen to mean the same. What
        # torch.nn.Transformer finds out under torch.compile is no bool yet: then the mask stays.
        hint = is_causal is True and (more > 0 or not attn_mask.requires_grad)
        if hint and (need_weights or key_padding_mask is not None):
            hint = not more and _is_causal(attn_mask)
        attn_mask = None if hint else attn_mask
        _warn_of_mismatch(attn_mask, key_padding_mask)
        len_k = None if more or need_weights else _lengths(attn_mask, key_padding_mask)
        mask = _merged(attn_mask, None if len_k is not None else key_padding_mask, q, more)
        scale, right = self._head_dim**-0.5, 0 if hint else NO_LIMIT
        torch_can = not (need_weights or (hint and mask is not None))
        if torch_can and support.why_torch_is_faster(q, k, v, mask):
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, hint, scale=scale)
        else:
            options = {"scale": scale, "mask": mask, "right": right, "dropout": dropout}
            options["rng"] = random_state(q) if dropout else None
            out, lse = attention(q, k, v, len_k=len_k, **options)
        out = out.transpose(1, 2).flatten(2)
        if unbatched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        out = project(out, self.out_proj.weight, self.out_proj.bias)
        if not need_weights:
            return out, None
        weights = attention_weights(q, k, lse, mean=average_attn_weights, **options)
        return out, weights.squeeze(0) if unbatched else weights

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """If not, torch raises in its own words, or makes sense of it."""
        weight, casts = self.out_proj.weight, torch.is_autocast_enabled(query.device.type)
        for t, size in ((query, self.embed_dim), (key, self.kdim), (value, self.vdim)):
            if t.dim() != query.dim() or t.size(-1) != size or t.device != weight.device:
                return False
            if not (casts or t.dtype == weight.dtype):
                return False
        if query.dim() == 3:
            time = 1 if self.batch_first else 0
            rows, N, L, S = (query.size(1 - time),), query.size(1 - time), query.size(time), key.size(time)
        elif query.dim() == 2:
            rows, N, L, S = (), 1, query.size(0), key.size(0)
        else:
            return False
        # compared one by one: torch.export would take what torch.Size multiplies for constants
        if any(key.size(d) != value.size(d) for d in range(key.dim() - 1)):
            return False
        if rows and key.size(1 - time) != N:
            return False

        def mask_fits(mask: Tensor | None, *shapes: tuple[int, ...]) -> bool:
            return mask is None or (
                tuple(mask.shape) in shapes
                and mask.device == weight.device
                and (
                    mask.dtype in (torch.bool, torch.float32, query.dtype)
                    or (casts and mask.is_floating_point())
                )
            )

        if (attn_mask is None and is_causal) or self.embed_dim % self.num_heads:
            return False
        return mask_fits(key_padding_mask, (*rows, S)) and mask_fits(
            attn_mask, (L, S), (N * self.num_heads, L, S)
        )

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Projects to [N,H,T,features per head], views of as few matrix products as the inputs allow."""
        weight, bias, E = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if query is key is value and weight is not None:
            qkv = project(query, weight, bias).unflatten(-1, (3, self.num_heads, self._head_dim))
            if query.dim() == 2:
                qkv = qkv.unsqueeze(0)
            return (
                qkv.permute(2, 0, 3, 1, 4)
                if self.batch_first or query.dim() == 2
                else qkv.permute(2, 1, 3, 0, 4)
            )
        if weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            projected = [
                project(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
            ]
        else:
            groups = [(query, 1), (key, 2)] if key is value else [(query, 1), (key, 1), (value, 1)]
            sizes = [n * E for _, n in groups]
            biases = [None] * len(groups) if bias is None else bias.split(sizes)
            projected = [
                part
                for (x, n), w, b in zip(groups, weight.split(sizes), biases, strict=True)
                for part in project(x, w, b).chunk(n, -1)
            ]
        heads = [p.unflatten(-1, (self.num_heads, self._head_dim)) for p in projected]
        if query.dim() == 2:
            return [h.transpose(0, 1).unsqueeze(0) for h in heads]
        return [h.transpose(1, 2) if self.batch_first else h.permute(1, 2, 0, 3) for h in heads]

    def _with_bias_and_zeros(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """bias_k and bias_v, and a key and value of zeros, behind all others."""
        N, H, _, d = k.shape
        ks, vs = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            ks, vs = (
                [t, bias.to(t.dtype).view(1, H, 1, d).expand(N, -1, -1, -1)]
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            ks, vs = ([*ts, ts[0].new_zeros(N, H, 1, d)] for ts in (ks, vs))
        return (k, v) if len(ks) == 1 else (torch.cat(ks, 2), torch.cat(vs, 2))

    def _fits_nested(self, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor | None) -> bool:
        """The nested tensors that torch.nn.TransformerEncoder makes of padded ones in inference."""
        return (
            query is key is value
            and query.is_nested
            and query.layout == torch.strided
            and query.dim() == 3
            and query.is_contiguous()
            and query.dtype == self.out_proj.weight.dtype
            and masks == (None, None)
            and self.batch_first
            and self._qkv_same_embed_dim
            and self.bias_k is None
            and not self.add_zero_attn
            and not torch.is_grad_enabled()
            and not self.training
        )

    def _forward_nested(self, x: Tensor) -> Tensor:
        """Self-attention in a strided nested tensor, by its rows without padding."""
        sizes, tokens = x._nested_tensor_size(), x.values().view(-1, self.embed_dim)
        cu = F.pad(sizes[:, 0].cumsum(0), (1, 0)).to(x.device)
        longest = int(sizes[:, 0].max())
        q, k, v = self._heads(*[tokens] * 3)
        out, _ = attention(
            q, k, v, scale=self._head_dim**-0.5, cu_q=cu, cu_k=cu, max_q=longest, max_k=longest
        )
        out = project(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        layout = sizes, x._nested_tensor_strides(), x._nested_tensor_storage_offsets()
        return torch._nested_view_from_buffer(out.flatten(), *layout)


def _warn_of_mismatch(attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> None:
    both = attn_mask is not None and key_padding_mask is not None and not support.is_compiling()
    if both and attn_mask.dtype != key_padding_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. "
            "Use same type for both instead.",
            stacklevel=4,
        )


def _is_causal(mask: Tensor) -> bool:
    """True only where it costs nothing to know: on a GPU the host would have to wait."""
    if mask.device.type != "cpu" or type(mask) is not Tensor or not support.is_eager():
        return False
    keys = torch.arange(mask.size(-1))
    for i, rows in enumerate(mask.split(64, -2)):  # in parts: no second tensor of L x S
        future = keys > torch.arange(64 * i, 64 * i + rows.size(-2))[:, None]
        wanted = future if mask.dtype == torch.bool else torch.where(future, -torch.inf, 0.0)
        if not torch.equal(rows, wanted.to(mask.dtype).expand_as(rows)):
            return False
    return True


def _lengths(attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """Of each row the number of keys, where padding hides the last ones only: then two masks need not be
    merged into one of [N,1,L,S]. Looks at the mask, so that it is for the CPU and plain calls."""
    both = attn_mask is not None and key_padding_mask is not None
    if not (both and key_padding_mask.device.type == "cpu" and support.is_plain_call()):
        return None
    traced = type(key_padding_mask) is not Tensor or support.is_dispatched()
    if traced or key_padding_mask.dtype != torch.bool:
        return None
    visible = ~key_padding_mask
    lengths, keys = visible.sum(1), torch.arange(visible.size(1), device="cpu")
    return lengths if torch.equal(visible, keys < lengths[:, None]) else None


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, more: int) -> Tensor | None:
    """Four dims, True where a query sees a key; or float to be added, if one of the masks is."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, q.shape[:2]))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if more:
        masks = [F.pad(m, (0, more)) for m in masks]
    if all(m.dtype == torch.bool for m in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1]) if masks else None
    masks = [
        m if m.is_floating_point() else torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -torch.inf)
        for m in masks
    ]
    return masks[0] if len(masks) == 1 else masks[0] + masks[1]
