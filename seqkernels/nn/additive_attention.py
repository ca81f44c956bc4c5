"""AdditiveAttention: Bahdanau's, as a module."""

from numbers import Integral

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module, Parameter, init

from seqkernels.additive import additive_attention
from seqkernels.nn._base import as_one_node, project


class AdditiveAttention(Module):
    """softmax_j(v . tanh(W_q query_i + W_k key_j + bias)) @ value (Bahdanau, Cho & Bengio 2015, A.1.2).

    Parameters: q_proj_weight [hidden_size,query_size], k_proj_weight [hidden_size,key_size], v [hidden_size],
    with bias=True bias [hidden_size], with normalize=True g [], so that v becomes g v / |v| (Salimans &
    Kingma 2016). All but bias and g are uniform in +-1/sqrt(fan in); bias is 0, g is 1/sqrt(hidden_size).
    dtypes: float32, float64 (on a GPU by torch), bfloat16, float16. Raises ValueError for a size below 1.
    Equal to `softmax(torch.tanh((query @ q_proj_weight.T).unsqueeze(2) + (key @ k_proj_weight.T).unsqueeze(1)
    + bias) @ v, -1) @ value`.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        hidden_size: int,
        bias: bool = True,
        normalize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("query_size", query_size), ("key_size", key_size), ("hidden_size", hidden_size)):
            if not isinstance(size, Integral) or size <= 0:
                raise ValueError(f"{name} must be an integer > 0, got {size!r}")

        self.query_size, self.key_size, self.hidden_size = map(int, (query_size, key_size, hidden_size))

        def parameter(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.q_proj_weight = parameter(hidden_size, query_size)
        self.k_proj_weight = parameter(hidden_size, key_size)
        self.v = parameter(hidden_size)
        self.register_parameter("bias", parameter(hidden_size) if bias else None)
        self.register_parameter("g", parameter() if normalize else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.q_proj_weight, self.k_proj_weight, self.v):
            bound = weight.size(-1) ** -0.5
            init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            init.zeros_(self.bias)
        if self.g is not None:
            init.constant_(self.g, self.hidden_size**-0.5)

    def project_keys(self, key: Tensor) -> Tensor:
        """W_k key [...,hidden_size], for `projected_keys`: once for all steps of a decoder.

        Raises ValueError for a key that is not [...,key_size].
        """
        return self._project("key", key, self.k_proj_weight)

    @staticmethod
    def _project(name: str, x: Tensor, weight: Tensor) -> Tensor:
        if x.dim() == 0 or x.size(-1) != weight.size(1):
            raise ValueError(f"{name} must be [...,{weight.size(1)}], got {list(x.shape)}")
        return project(x, weight, None)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None = None,
        *,
        projected_keys: Tensor | None = None,
        key_lengths: Tensor | None = None,
        attn_mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Context [B,Tq,Dv] and weights [B,Tq,Tk], or None where they are not needed.

        query [B,Tq,query_size], key [B,Tk,key_size], value [B,Tk,Dv], or key if None. A query [B,query_size]
        is one step of a decoder: context [B,Dv], weights and attn_mask [B,Tk].

        projected_keys: what `project_keys(key)` gave; key is then only the value, and may be None beside one.
        key_lengths, attn_mask, errors: as in `seqkernels.additive_attention`.
        """
        if isinstance(query, Proxy):
            options = {"projected_keys": projected_keys, "key_lengths": key_lengths, "attn_mask": attn_mask}
            return as_one_node(self, query, key, value, **options, need_weights=need_weights)
        if key is None and (value is None or projected_keys is None):
            raise ValueError("key may be None only where both value and projected_keys are given")
        keys = self.project_keys(key) if projected_keys is None else projected_keys
        value = key if value is None else value
        one_step = query.dim() == 2 and keys.dim() == 3
        if one_step and attn_mask is not None and attn_mask.dim() == 2:
            attn_mask = attn_mask.unsqueeze(1)
        queries = self._project("query", query, self.q_proj_weight)
        v = self.v if self.g is None else self.g * self.v / self.v.norm()
        result = additive_attention(
            queries.unsqueeze(1) if one_step else queries,
            keys,
            value,
            v,
            bias=self.bias,
            key_lengths=key_lengths,
            attn_mask=attn_mask,
            need_weights=need_weights,
        )
        context, weights = result if need_weights else (result, None)
        if one_step:
            context, weights = context.squeeze(1), weights if weights is None else weights.squeeze(1)
        return context, weights

    def __prepare_scriptable__(self) -> Module:
        raise RuntimeError(
            "torch.jit.script knows torch's operators only, and torch has no additive attention:"
            " torch.jit.trace or torch.export the model"
        )

    def extra_repr(self) -> str:
        return (
            f"{self.query_size}, {self.key_size}, hidden_size={self.hidden_size}, "
            f"bias={self.bias is not None}, normalize={self.g is not None}"
        )
