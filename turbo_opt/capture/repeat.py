"""Trace one block of each kind, and repeat its nodes for the blocks that equal it.

Tracing takes most of a capture's time, and the forty blocks of a model are one block with other
weights. The model's own forward is traced, loop and all, but where a block is reached that equals
one traced before (same classes, settings and shapes of weights, down to every submodule) and that
is given the same kind of arguments (structure, shapes, strides, dtypes), a single node stands for
it. `expand` then puts the traced block's nodes there, with the arguments of that node and the
weights of that block. A block of which any of this does not hold is traced like the first.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from turbo_opt.ir.edit import parameter_names, with_graph

_ENTER, _LEAVE, _REPEAT = "enter", "leave", "repeat"
_SCHEMA = "(Tensor[] values, Tensor[] like, str role, str block) -> Tensor[]"


@torch.library.custom_op("turbo_opt_capture::mark", mutates_args=(), schema=_SCHEMA)
def _mark(values: Sequence[Tensor], like: Sequence[Tensor], role: str, block: str) -> list[Tensor]:
    """Stands in a traced graph for the arguments (`enter`), the results (`leave`) or all
    (`repeat`) of a block; gives one tensor for each of `like`, of its layout."""
    raise NotImplementedError("a mark is only traced, never run")


@_mark.register_fake
def _(values: Sequence[Tensor], like: Sequence[Tensor], role: str, block: str) -> list[Tensor]:
    return [
        torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=item.device)
        for item in like
    ]


_MARK = torch.ops.turbo_opt_capture.mark.default
_SIZE = torch.ops.aten.sym_size.int


@contextlib.contextmanager
def repeated_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, a trace of `model` has marks instead of the blocks that equal one before them."""
    changed = [block for kind in _kinds(model) for block in kind.install()]
    try:
        yield
    finally:
        for block in changed:
            del block.forward


def expand(exported: ExportedProgram) -> ExportedProgram:
    """The program with every mark replaced by the nodes that it stands for."""
    return with_graph(exported, *_Expansion(exported).run())


@dataclass
class _Kind:
    """Blocks that equal one another: the first is traced, the others are marked.

    Attributes:
        blocks: path → module.
        traced: what went into the first and came out of it; None before that.
    """

    blocks: dict[str, nn.Module]
    traced: tuple[_Values, _Values] | None = field(default=None)

    def install(self) -> list[nn.Module]:
        """Give each block a forward that marks; the blocks."""
        for path, block in self.blocks.items():
            block.forward = self._forward(path, block.forward)
        return list(self.blocks.values())

    def _forward(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        first = path == next(iter(self.blocks))

        def marked(*args: Any, **kwargs: Any) -> Any:
            given = _Values.of((args, kwargs))
            if self.traced is not None and not first and given.is_like(self.traced[0]):
                result = self.traced[1]
                return result.rebuilt(_mark(given.tensors, result.tensors, _REPEAT, path))
            if self.traced is not None or not first:
                return forward(*args, **kwargs)
            entered = _mark(given.tensors, given.tensors, _ENTER, path)
            args, kwargs = given.rebuilt(entered)
            result = _Values.of(forward(*args, **kwargs))
            left = _mark(result.tensors, result.tensors, _LEAVE, path)
            if all(isinstance(item, Tensor) for item in result.leaves):
                self.traced = given, result
            return result.rebuilt(left)

        return marked


@dataclass(frozen=True)
class _Values:
    """Nested arguments or results, flat."""

    leaves: Sequence[Any]
    structure: Any

    @classmethod
    def of(cls, nested: Any) -> _Values:
        return cls(*pytree.tree_flatten(nested))

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """The same structure with other tensors."""
        others = iter(tensors)
        leaves = [next(others) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.structure)

    def is_like(self, other: _Values) -> bool:
        """Whether a trace cannot tell the two apart."""
        return self.structure == other.structure and all(
            _layout(mine) == _layout(its)
            for mine, its in zip(self.leaves, other.leaves, strict=True)
        )


def _layout(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return type(leaf), _size(leaf)
    sizes = (*leaf.shape, *leaf.stride(), leaf.storage_offset())
    return leaf.ndim, [_size(side) for side in sizes], leaf.dtype, leaf.device


def _size(side: Any) -> Any:
    """A size as an expression: comparing symbolic ones themselves would add a guard."""
    return side.node.expr if isinstance(side, torch.SymInt) else side


def _kinds(model: nn.Module) -> Iterator[_Kind]:
    """The blocks of every outermost stack, those that equal one another together."""
    inside: tuple[str, ...] = ()
    for path, stack in model.named_modules():
        if isinstance(stack, nn.ModuleList) and not path.startswith(inside):
            inside = (*inside, path + ".")
            kinds: list[_Kind] = []
            for name, block in stack.named_children():
                for kind in kinds:
                    if _equal(next(iter(kind.blocks.values())), block):
                        kind.blocks[f"{path}.{name}"] = block
                        break
                else:
                    kinds.append(_Kind({f"{path}.{name}": block}))
            yield from (kind for kind in kinds if len(kind.blocks) > 1)


def _equal(one: Any, other: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Whether two modules, or what they hold, differ in nothing but the values of weights."""
    if one is other or id(one) in seen:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    seen = seen | {id(one)}
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(_equal(one[key], other[key], seen) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(
            _equal(mine, its, seen) for mine, its in zip(one, other, strict=True)
        )
    if hasattr(one, "__dict__") and not isinstance(one, types.FunctionType | type):
        return _equal(vars(one), vars(other), seen)
    return bool(one == other)


class _Expansion:
    """Copies a traced graph node by node, and the traced block's nodes where a mark stands."""

    def __init__(self, exported: ExportedProgram) -> None:
        self._source = exported.graph
        self._signature = copy.deepcopy(exported.graph_signature)
        self._weights = parameter_names(exported)
        self._placeholders = {name: node for node, name in self._weights.items()}
        self._graph = Graph()
        self._copies: dict[Node, Node] = {}
        self._blocks: dict[tuple[Node, ...], _Block] = {}

    def run(self) -> tuple[Graph, ExportGraphSignature]:
        """The whole graph, and the signature with the names of its nodes."""
        block: _Block | None = None
        for node in self._source.nodes:
            role = node.args[2] if node.target is _MARK else None
            if role == _ENTER:
                block = _Block(str(node.args[3]), node)
            elif role == _LEAVE:
                assert block is not None
                # What a mark for an equal block names, to say which one it equals.
                self._blocks[tuple(node.args[0])] = block  # type: ignore[arg-type]
                block = None
            elif role == _REPEAT:
                self._repeat(self._blocks[tuple(node.args[1])], node)  # type: ignore[arg-type]
            elif not self._is_result(node):
                self._copies[node] = self._graph.node_copy(node, self._copies.__getitem__)
                if block is not None:
                    block.nodes.append(node)
        self._rename_outputs()
        return self._graph, self._signature

    def _rename_outputs(self) -> None:
        names = {node.name: copied.name for node, copied in self._copies.items()}
        for spec in self._signature.output_specs:
            spec.arg.name = names.get(spec.arg.name, spec.arg.name)

    def _is_result(self, node: Node) -> bool:
        """Whether a node is one result of a mark; it is then known what it stands for."""
        if node.target is not operator.getitem or node.args[0].target is not _MARK:  # type: ignore[union-attr]
            return False
        mark, index = node.args
        if mark.args[2] != _REPEAT:  # type: ignore[union-attr]
            self._copies[node] = self._copies[mark.args[0][index]]  # type: ignore[index,union-attr]
        return True

    def _repeat(self, block: _Block, mark: Node) -> None:
        """Copy the nodes of a traced block for the one that `mark` stands for."""
        path = str(mark.args[3])
        copies = dict(self._copies)
        given = mark.args[0]
        for entry in block.enter.users:
            copies[entry] = self._copies[given[entry.args[1]]]  # type: ignore[index]
        for name, placeholder in self._placeholders.items():
            if name.startswith(block.path + "."):
                its = self._placeholders[path + name.removeprefix(block.path)]
                copies[placeholder] = self._copies[its]
        for node in block.nodes:
            if node.target is _SIZE and copies[node.args[0]] is self._copies.get(node.args[0]):  # type: ignore[index,arg-type]
                continue  # the size of what all blocks are given, asked for once
            copied = self._graph.node_copy(node, copies.__getitem__)
            copied.meta = _moved(node.meta, block.path, path)
            copies[node] = copied
        for entry in mark.users:
            self._copies[entry] = copies[mark.args[1][entry.args[1]]]  # type: ignore[index]


@dataclass
class _Block:
    """The nodes of a traced block, in a traced graph."""

    path: str
    enter: Node
    nodes: list[Node] = field(default_factory=list)


def _moved(meta: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """What a node of one block says of itself, said of another block."""
    stack = {}
    for key, (path, module) in meta.get("nn_module_stack", {}).items():
        if path == old or path.startswith(old + "."):
            key, path = (
                key.replace(path, new + path.removeprefix(old)),
                new + path.removeprefix(old),
            )
        stack[key] = (path, module)
    return {**meta, "nn_module_stack": stack}
