"""Rotary writes as a value: two strided copies into an empty tensor become an interleave.

    out = empty_like(x); out[..., 0::2] = even; out[..., 1::2] = odd
        →  flatten(stack([even, odd], −1), −2)

Bit for bit the same; without mutation, and without ScatterND once lowered to ONNX.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from turbo_opt.compiler.base import PassResult
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import (
    Editor,
    Found,
    Miss,
    clean,
    dtype_of,
    is_call,
    rewrite_each,
    tensor_of,
)
from turbo_opt.ir.program import Denoiser, Program

aten = torch.ops.aten


def make_rotary_functional(program: Program, context: PassContext) -> PassResult:
    """Replace every pair of half writes by an interleave."""
    result = rewrite_each(program, context, _match_half_writes, _interleave)
    for denoiser in program:
        _erase_unread_buffers(denoiser)
    return result


def _match_half_writes(node: Node, denoiser: Denoiser) -> Found | Miss | None:
    if not is_call(node, aten.empty_like.default):
        return None
    halves: dict[int, Node] = {}
    readers = []
    for user in node.users:
        write = next(iter(user.users), None) if is_call(user, aten.slice.Tensor) else None
        if write is None or not is_call(write, aten.copy_.default):
            readers.append(user)
            continue
        half = _half_of(user, tensor_of(node).ndim - 1)
        if half is None or half in halves or write.args[0] is not user:
            return Miss("the parts written into an empty tensor are not its interleaved halves")
        halves[half] = write.args[1]  # type: ignore[assignment]
    if not halves:
        return None
    if set(halves) != {0, 1}:
        return Miss("only one interleaved half of an empty tensor is written")
    if len(readers) != 1 or readers[0].op != "call_function":
        return Miss("the written tensor has not exactly one reader")
    others = {*node.all_input_nodes, *readers[0].all_input_nodes} - {node}
    parts = {"buffer": node, "halves": (halves[0], halves[1])}
    return Found(node, readers[0], (halves[0], halves[1], *others), parts)


def _half_of(view: Node, last_dim: int) -> int | None:
    """0 or 1 when `view` takes every second element of the last axis, else None."""
    _, dim, start, end, step = (*view.args, *(None,) * 5)[:5]
    if dim not in (last_dim, -1) or step != 2 or not isinstance(end, int) or end < 2**31:
        return None
    return {0: 0, None: 0, 1: 1}.get(start)  # type: ignore[arg-type]


def _interleave(found: Found, editor: Editor) -> Node:
    """The reader of the buffer, reading the interleaved halves instead."""
    reader, buffer = found.output, found.parts["buffer"]
    dtype = dtype_of(buffer)
    halves = [
        half if dtype_of(half) == dtype else editor.call(aten.to.dtype, half, dtype)
        for half in found.parts["halves"]
    ]
    pairs = editor.call(aten.stack.default, halves, -1)
    whole = editor.call(aten.flatten.using_ints, pairs, -2)
    args = tuple(whole if argument is buffer else argument for argument in reader.args)
    return editor.call(reader.target, *args, **reader.kwargs)  # type: ignore[arg-type]


def _erase_unread_buffers(denoiser: Denoiser) -> None:
    """Erase buffers that are only written to, with their writes."""
    graph = denoiser.graph
    for buffer in reversed(list(graph.nodes)):
        if not is_call(buffer, aten.empty_like.default):
            continue
        writes = [write for view in buffer.users for write in view.users]
        if any(write.users or not is_call(write, aten.copy_.default) for write in writes):
            continue
        if all(is_call(view, aten.slice.Tensor) and view.users for view in buffer.users):
            for node in (*writes, *buffer.users, buffer):
                graph.erase_node(node)
    clean(denoiser)
