"""Attention in a graph: which projections its operands come from, and heads ↔ channels.

B batch, L tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
from turbo_opt.compiler.rewrite import is_call, named_args, only_user, tensor_of

aten = torch.ops.aten
_LINEAR = frozenset({aten.linear.default, torch.ops.turbo_opt.block_linear.default})


def is_dense_attention(node: Node) -> bool:
    """Whether `node` is PyTorch's attention."""
    return is_call(node, aten.scaled_dot_product_attention.default)


def unlike_self_attention(node: Node, head_dim: int) -> str | None:
    """Why an attention is not plain self-attention with heads of that size, in one clause."""
    call = named_args(node)
    q, k, v = call["query"], call["key"], call["value"]
    sources = [hidden_states(operand) for operand in (q, k, v)]
    if any(len(source) != 1 for source in sources):
        return "q, k and v are not each one projection of a hidden state"
    if sources[0] != sources[1] or sources[0] != sources[2]:
        return "cross-attention: q, k and v are projections of different tensors"
    if call["attn_mask"] is not None:
        return "it has a mask"
    if call["dropout_p"]:
        return "it has dropout"
    if call["is_causal"]:
        return "it is causal"
    if tensor_of(q).shape[1] != tensor_of(k).shape[1]:
        return "its keys are shared between heads"
    found, scale = tensor_of(q).shape[-1], call["scale"]
    if found != head_dim:
        return f"its head dimension is {found}, the operators take {head_dim}"
    if scale is not None and not math.isclose(scale, head_dim**-0.5):
        return f"its scale is {scale:.4g} instead of 1/√{head_dim}"
    return None


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
