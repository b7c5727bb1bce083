"""How the two forms of an epilogue are compared: in float32, by what the next layer sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from turbo_opt.compiler.rewrite import Editor, Found, named_args
from turbo_opt.kernels import SCHEMES, dequantize_activation

aten = torch.ops.aten
ops = torch.ops.turbo_opt


def in_float32(found: Found, new: Node, editor: Editor) -> Sequence[tuple[Node, Node]]:
    """Both forms on operands cast to float32."""

    def wide(operands: Sequence[Any]) -> Iterator[Any]:
        for x in operands:
            yield widened(x, editor) if isinstance(x, Node) else x

    source, scheme = named_args(found.output).values()
    unquantized = editor.call(source.target, *wide(source.args), **source.kwargs)
    before = editor.call(ops.quantize_activation.default, unquantized, scheme)
    return [(before, editor.call(new.target, *wide(new.args)))]  # type: ignore[arg-type]


def widened(operand: Node | None, editor: Editor) -> Node | None:
    """The operand in float32, None as it is."""
    return None if operand is None else editor.call(aten.to.dtype, operand, torch.float32)


def observe(value: Any) -> Tensor:
    """A tensor as it is; of (…, values, scales) what the next layer sees."""
    if isinstance(value, Tensor):
        return value
    values, scales = value[-2:]
    (scheme,) = (name for name, scheme in SCHEMES.items() if scheme.dtype == values.dtype)
    return dequantize_activation(values, scales, scheme)
