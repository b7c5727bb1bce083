"""Attention in a graph: which projections its operands come from, and heads ↔ channels.

B batch, L tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
from torch.fx import Node

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
from turbo_opt.compiler.rewrite import is_call, named_args, only_user, tensor_of
from turbo_opt.targets import Target

aten = torch.ops.aten
ops = torch.ops.turbo_opt
PVFormat = Literal["auto", "fp8", "16bit"]
"""Operands of P·v where q·kᵀ is int8; auto: fp8 on GPUs that have it."""
_FIRST_WITH_FP8 = (8, 9)
_LINEAR = frozenset({aten.linear.default, ops.block_linear.default})
_SPARSE = frozenset(
    {
        ops.sla.default,
        ops.sagesla.default,
        ops.sla2.default,
        ops.norm_rope_sagesla.default,
        ops.norm_rope_sagesla_quantize.default,
    }
)


def is_dense_attention(node: Node) -> bool:
    """Whether `node` is PyTorch's attention."""
    return is_call(node, aten.scaled_dot_product_attention.default)


def is_sparse_attention(node: Node) -> bool:
    """Whether `node` is one of our sparse attention operators."""
    return node.op == "call_function" and node.target in _SPARSE


def is_sage_attention(node: Node) -> bool:
    """Whether `node` is dense attention in 8 bits."""
    return is_call(node, ops.sage_attention.default)


def unlike_self_attention(node: Node, head_dim: int) -> str | None:
    """Why an attention is not plain self-attention with heads of that size, in one clause."""
    call = named_args(node)
    sources = [hidden_states(call[operand]) for operand in ("query", "key", "value")]
    if any(len(source) != 1 for source in sources):
        return "q, k and v are not each one projection of a hidden state"
    if sources[0] != sources[1] or sources[0] != sources[2]:
        return "cross-attention: q, k and v are projections of different tensors"
    objection, scale = unlike_plain_attention(node, (head_dim,)), call["scale"]
    if objection is None and scale is not None and not math.isclose(scale, head_dim**-0.5):
        return f"its scale is {scale:.4g} instead of 1/√{head_dim}"
    return objection


def unlike_plain_attention(node: Node, head_dims: Collection[int]) -> str | None:
    """Why an attention is more than softmax over all keys, or has heads of another size."""
    call = named_args(node)
    q, k, v = (tensor_of(call[operand]) for operand in ("query", "key", "value"))
    if call["attn_mask"] is not None:
        return "it has a mask"
    if call["dropout_p"]:
        return "it has dropout"
    if call["is_causal"]:
        return "it is causal"
    if not q.ndim == k.ndim == v.ndim == 4:
        return "q, k and v do not have four axes: batch, heads, tokens and channels"
    if any(x.shape[0] != q.shape[0] for x in (k, v)):
        return "its keys are shared between batch elements"
    if any(x.shape[1] != q.shape[1] for x in (k, v)):
        return "its keys are shared between heads"
    if q.shape[-1] not in head_dims:
        allowed = " or ".join(map(str, head_dims))
        return f"its head dimension is {q.shape[-1]}, the operators take {allowed}"
    if v.shape[-1] != q.shape[-1]:
        return f"v has {v.shape[-1]} channels a head, q and k have {q.shape[-1]}"
    return None


def attention_kind(node: Node) -> Literal["self", "cross"] | None:
    """Whether q and k are projections of the same hidden states; None where either is of none."""
    call = named_args(node)
    q_source, k_source = hidden_states(call["query"]), hidden_states(call["key"])
    if not q_source or not k_source:
        return None
    return "self" if q_source == k_source else "cross"


def pv_format(pv: PVFormat, target: Target | None) -> str:
    """The format that an option stands for on the target."""
    if pv != "auto":
        return pv
    return "fp8" if target is not None and _has_fp8(target) else "16bit"


def objection_to_pv(pv: PVFormat, target: Target) -> str | None:
    """Why the target cannot run that format of P·v, in one clause."""
    if pv == "fp8" and not _has_fp8(target):
        return f"{target.name} cannot run pv fp8, which needs sm89; 16bit runs everywhere"
    return None


def _has_fp8(target: Target) -> bool:
    capability = target.compute_capability
    return capability is not None and capability >= _FIRST_WITH_FP8


def hidden_states(node: Node) -> set[Node]:
    """What the nearest linear layers above `node` read: the hidden state of a projection."""
    return {layer.all_input_nodes[0] for layer in _linear_ancestors(node)}


def as_channels(node: Any) -> Node | None:
    """The (B, L, H·D) tensor whose heads `node` (B, H, L, D) is, through views only."""
    heads = tokens_first(node)
    if not is_call(heads, aten.unflatten.int):
        return None
    call = named_args(heads)
    source: Node = call["self"]
    return source if tensor_of(source).ndim == 3 and call["dim"] in (2, -1) else None


def joined_channels(attention: Node) -> Node | None:
    """The (B, L, H·D) form of an attention's result (B, H, L, D), where that is its only use."""
    swapped = only_user(attention)
    if tokens_first(swapped) is not attention or swapped is None:
        return None
    channels = only_user(swapped)
    return channels if channels is not None and joins_last_two(channels) else None


def joins_last_two(node: Any) -> bool:
    """Whether `node` flattens the last two axes of a tensor into one."""
    if not is_call(node, aten.flatten.using_ints):
        return False
    call = named_args(node)
    ndim = tensor_of(call["self"]).ndim
    return (call["start_dim"] % ndim, call["end_dim"] % ndim) == (ndim - 2, ndim - 1)


def tokens_first(node: Any) -> Node | None:
    """The tensor of which `node` is the view with axes 1 and 2 of 4 exchanged."""
    if is_call(node, aten.permute.default):
        call = named_args(node)
        return call["self"] if list(call["dims"]) == [0, 2, 1, 3] else None
    if is_call(node, aten.transpose.int):
        call = named_args(node)
        return call["self"] if {call["dim0"] % 4, call["dim1"] % 4} == {1, 2} else None
    return None


def _linear_ancestors(node: Node) -> Iterator[Node]:
    stack, seen = [node], set[Node]()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "call_function" and current.target in _LINEAR:
            yield current
        elif not isinstance(current.meta.get("val"), torch.SymInt):
            stack.extend(current.all_input_nodes)
