"""Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762) as linear maps of queries, keys, values and of the output.

Parts: ``in_proj`` (the three stacked projections, each with factors of its own), or ``q``, ``k``, ``v`` where keys or values
have another size, and ``out_proj``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt.layers.parts import Composite, Part, PartRows, Replayed, plain_linear, register_composite


@dataclass(frozen=True)
class _Call:
    """Arguments of the forward, inputs detached and ``[batch, positions, features]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None  # additive, broadcasts to [batch, heads, queries, keys]
    is_causal: bool
    need_weights: bool
    average_weights: bool
    same_inputs: bool
    batched: bool


@register_composite(nn.MultiheadAttention)
class AttentionParts(Composite):
    """Self- and cross-attention with every mask; not ``add_bias_kv`` and ``add_zero_attn``."""

    def parts(self, module: nn.Module) -> list[Part]:
        assert isinstance(module, nn.MultiheadAttention)
        own, last = module._parameters, module.out_proj._parameters
        of_output = last.get("weight")
        if module.bias_k is not None or module.add_zero_attn or of_output is None:
            return []
        found = []
        if module._qkv_same_embed_dim:
            projections = [("in_proj", own.get("in_proj_weight"), own.get("in_proj_bias"), 3)]
        else:  # their biases are stacked in one parameter, which has no matrix of its own
            projections = [(name, own.get(f"{name}_proj_weight"), None, 1) for name in "qkv"]
        for name, weight, bias, groups in projections:
            if weight is None:
                return []
            found.append(Part(name, weight, bias, groups))
        found.append(Part("out_proj", of_output, last.get("bias")))
        return found

    def draws(self, module: nn.Module) -> bool:
        return module.training and float(module.dropout) > 0.0  # type: ignore[arg-type]

    def replay(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> Replayed:
        assert isinstance(module, nn.MultiheadAttention)
        call = _read(module, *args, **kwargs)
        projected, rows = _project(module, call)
        dropout = float(module.dropout) if module.training else 0.0
        context, weights = _attend(module.num_heads, call, projected, dropout)
        out = plain_linear(context, module.out_proj.weight, module.out_proj.bias)
        rows["out_proj"] = PartRows(context.detach().unsqueeze(0), (out,), lambda found: found[0].unsqueeze(0))
        if not call.batched:
            result = out.squeeze(0)
        else:
            result = out if module.batch_first else out.transpose(0, 1)
        own = [result]
        if weights is not None:
            weights = weights.mean(1) if call.average_weights else weights
            own.append(weights if call.batched else weights.squeeze(0))
        return Replayed(own, rows)


def _read(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> _Call:
    """The forward's own signature."""
    batched = query.dim() == 3
    same = query is key and key is value

    def batch_first(x: Tensor) -> Tensor:
        x = x.detach()
        if not batched:
            return x.unsqueeze(0)
        return x if module.batch_first else x.transpose(0, 1)

    by_hint = is_causal and key_padding_mask is None and not need_weights  # the kernel knows the mask by itself
    mask = None if by_hint else _additive(attn_mask, query.dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, module.num_heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, query.dtype)
        assert padding is not None
        padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        mask = padding if mask is None else mask + padding
    q, k, v = map(batch_first, (query, key, value))
    return _Call(q, k, v, mask, by_hint, need_weights, average_attn_weights, same, batched)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Zero where attention is allowed; True in a bool mask means that it is not."""
    if mask is None or mask.is_floating_point():
        return mask if mask is None else mask.detach()
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _project(module: nn.MultiheadAttention, call: _Call) -> tuple[list[Tensor], dict[str, PartRows]]:
    """Queries, keys and values ``[batch, positions, embedding]``, and the rows of their matrices."""
    inputs, biases = (call.query, call.key, call.value), module.in_proj_bias
    if call.same_inputs and module._qkv_same_embed_dim:
        joint = plain_linear(call.query, module.in_proj_weight, biases).requires_grad_()
        shared = call.query.expand(3, *call.query.shape)
        rows = PartRows(shared, (joint,), lambda found: found[0].unflatten(-1, (3, -1)).movedim(-2, 0))
        return list(joint.chunk(3, dim=-1)), {"in_proj": rows}

    if module._qkv_same_embed_dim:
        weights: Sequence[Tensor] = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    chunks = (None, None, None) if biases is None else biases.chunk(3)
    projected = [plain_linear(x, w, b).requires_grad_() for x, w, b in zip(inputs, weights, chunks)]
    if not module._qkv_same_embed_dim:
        return projected, {
            name: PartRows(x.unsqueeze(0), (out,), lambda found: found[0].unsqueeze(0))
            for name, x, out in zip("qkv", inputs, projected)
        }
    lengths = [x.shape[1] for x in inputs]
    longest, keep = max(lengths), None
    if min(lengths) != longest:
        own = [torch.arange(longest, device=call.query.device) < length for length in lengths]
        keep = torch.stack(own).unsqueeze(1).expand(-1, call.query.shape[0], -1)
    return projected, {"in_proj": PartRows(_stack(inputs, longest), tuple(projected), lambda found: _stack(found, longest), keep)}


def _stack(tensors: Sequence[Tensor], length: int) -> Tensor:
    """``[groups, batch, length, features]`` of ``[batch, positions, features]``, filled up with zeros."""
    return torch.stack([F.pad(x, (0, 0, 0, length - x.shape[1])) for x in tensors])


def _attend(num_heads: int, call: _Call, projected: Sequence[Tensor], dropout: float) -> tuple[Tensor, Tensor | None]:
    """Heads' outputs side by side ``[batch, queries, embedding]``; the weights ``[batch, heads, queries, keys]`` if asked for."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in projected)
    if not call.need_weights:  # as the module does, whose kernel may draw its dropout in its own way
        context = F.scaled_dot_product_attention(q, k, v, call.mask, dropout, call.is_causal)
        return context.transpose(1, 2).flatten(2), None
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
    weights = (scores if call.mask is None else scores + call.mask).softmax(-1)
    weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
    # Averaged, weights are an output of their own; else their gradient has that of the context in it.
    inner = weights if call.average_weights else weights.detach()
    return (inner @ v).transpose(1, 2).flatten(2), weights
