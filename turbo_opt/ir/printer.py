"""Graphs as text: to read, to compare, and to name by content."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from turbo_opt.ir.edit import parameter_names


def graph_text(exported: ExportedProgram, *, stable: bool = False) -> str:
    """One line per node: `%name: bf16[1, s0, 1536] = aten.linear(%x, %w, %b)`.

    Args:
        stable: number the nodes in order and the symbolic sizes in order of appearance, so that
            two graphs of the same content give the same text whatever their names.
    """
    names = _Names(exported, stable)
    lines = []
    for node in exported.graph.nodes:
        if node.op == "output":
            lines.append(f"return {names.argument(node.args[0])}")
        else:
            lines.append(f"%{names.node(node)}: {names.value(node)} = {names.call(node)}")
    return "\n".join(lines) + "\n"


def op_counts(exported: ExportedProgram) -> Counter[str]:
    """How often each operator is called; sizes and tuple items are left out."""
    counts: Counter[str] = Counter()
    for node in exported.graph.nodes:
        if node.op == "call_function" and not _is_bookkeeping(node):
            counts[op_name(node.target)] += 1
    return counts


def op_count_diff(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Operators whose count changed, with the change."""
    names = sorted({*before, *after})
    changes = {name: after.get(name, 0) - before.get(name, 0) for name in names}
    return {name: change for name, change in changes.items() if change}


def op_name(target: Any) -> str:
    """`aten.linear` for `torch.ops.aten.linear.default`; overloads other than default are kept."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _is_bookkeeping(node: Node) -> bool:
    return node.target is operator.getitem or isinstance(
        node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat)
    )


class _Names:
    """How nodes, symbols and values are written in one graph."""

    def __init__(self, exported: ExportedProgram, stable: bool) -> None:
        self._parameters = parameter_names(exported)
        self._stable = stable
        self._numbers = {node: index for index, node in enumerate(exported.graph.nodes)}
        self._symbols: dict[str, str] = {}
        self._sizes: dict[Any, str] = {}
        """Of expressions as they are written: a graph has some ten, thousands of times."""

    def node(self, node: Node) -> str:
        return str(self._numbers[node]) if self._stable else node.name

    def call(self, node: Node) -> str:
        if node.op == "placeholder":
            if node in self._parameters:
                return f"weight({self._parameters[node]})"
            return "input" if self._stable else f"input({node.target})"
        parts = [self.argument(item) for item in node.args]
        parts += [f"{key}={self.argument(item)}" for key, item in sorted(node.kwargs.items())]
        return f"{op_name(node.target)}({', '.join(parts)})"

    def argument(self, item: Any) -> str:
        if isinstance(item, Node):
            return f"%{self.node(item)}"
        if isinstance(item, (list, tuple)):
            return f"[{', '.join(self.argument(part) for part in item)}]"
        if isinstance(item, torch.device):
            return "device"
        return repr(item)

    def value(self, node: Node) -> str:
        return self._describe(node.meta.get("val"))

    def _describe(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            sides = ", ".join(self._size(side) for side in value.shape)
            return f"{_SHORT_DTYPES.get(value.dtype, str(value.dtype))}[{sides}]"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self._describe(part) for part in value)})"
        if isinstance(value, torch.SymInt):
            return f"int[{self._size(value)}]"
        return type(value).__name__

    def _size(self, side: Any) -> str:
        if isinstance(side, int) or not self._stable:
            return str(side)
        expression = side.node.expr
        if expression not in self._sizes:
            self._sizes[expression] = self._renamed(expression)
        return self._sizes[expression]

    def _renamed(self, expression: Any) -> str:
        renamed = {}
        for symbol in sorted(expression.free_symbols, key=str):
            self._symbols.setdefault(str(symbol), f"d{len(self._symbols)}")
            renamed[symbol] = self._symbols[str(symbol)]
        return str(expression.subs(renamed))


_SHORT_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
