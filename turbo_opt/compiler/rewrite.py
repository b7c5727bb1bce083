"""The one way in which passes find and replace patterns.

    rewrite_each(program, context, match, replace)

`match(node, view)` looks at an anchor: None when the node is not one, a `Miss` with the reason
when it nearly fits, a `Found` when it does. `replace(found, editor)` builds the new form before
the found output and returns its node, or old node → new node where several are replaced. Every
rewrite is verified before the old form goes away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from turbo_opt.compiler.base import Match, NearMiss, PassResult
from turbo_opt.compiler.context import Observe, PassContext
from turbo_opt.ir.edit import add_weight, insert_call, module_path, remove_unused_weights
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.weights import LazyTensor


@dataclass(frozen=True)
class Found:
    """A pattern in the graph.

    Attributes:
        anchor: the operator that the pattern hangs on.
        output: the node whose value the replacement gives.
        inputs: activations that go in; all else that `output` needs are weights and sizes.
        parts: what the replacement needs to know, by name.
    """

    anchor: Node
    output: Node
    inputs: tuple[Node, ...]
    parts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Miss:
    """An anchor that nearly fits, and why it does not, in one clause."""

    reason: str


class Editor:
    """Builds nodes in one denoiser's graph, before a given node."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.weights = denoiser.parameters()
        self._placeholders = {name: node for node, name in self.weights.items()}
        self._before: Node | None = None
        self._made: list[Node] = []

    def before(self, node: Node) -> Editor:
        """Build before `node` from now on."""
        self._before = node
        return self

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Call an operator on nodes and constants."""
        assert self._before is not None
        node = insert_call(self.denoiser.exported, self._before, target, args, kwargs)
        self._made.append(node)
        return node

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """Calls made inside are erased at the end."""
        kept = len(self._made)
        yield
        while len(self._made) > kept:
            self.denoiser.graph.erase_node(self._made.pop())

    def weight(self, name: str, tensor: LazyTensor) -> Node:
        """A placeholder for a new weight with this expression; the known one if it is there."""
        if name not in self._placeholders:
            node = add_weight(self.denoiser.exported, name, tensor.shape, tensor.dtype)
            self.denoiser.weights[name] = tensor
            self.weights[node] = name
            self._placeholders[name] = node
        return self._placeholders[name]


Replacement = Node | Mapping[Node, Node]
MatchFunction = Callable[[Node, Denoiser], Found | Miss | None]
ReplaceFunction = Callable[[Found, Editor], Replacement]
CompareFunction = Callable[[Found, Any, Editor], Sequence[tuple[Node, Node]]]


def rewrite_each(
    program: Program,
    context: PassContext,
    match: MatchFunction,
    replace: ReplaceFunction,
    observe: Observe | None = None,
    compare: CompareFunction | None = None,
) -> PassResult:
    """Replace every match in every denoiser of `program`, in place, and report.

    Args:
        observe: maps the output's value to the tensor to compare, for outputs that are tuples.
        compare: given the match, what `replace` returned and the editor, the pairs of nodes to
            verify instead of each old node and its new one. It may build nodes for the purpose.

    Raises:
        BudgetExceeded: a replacement computes something else than what it replaces.
    """
    matches: list[Match] = []
    misses: list[NearMiss] = []
    for denoiser in program:
        editor = Editor(denoiser)
        for node in list(denoiser.graph.nodes):
            found = match(node, denoiser)
            if isinstance(found, Miss):
                misses.append(NearMiss(denoiser.name, node.name, module_path(node), found.reason))
            elif isinstance(found, Found):
                record = Match(denoiser.name, found.anchor.name, module_path(found.anchor))
                new = replace(found, editor.before(found.output))
                pairs = new if isinstance(new, Mapping) else {found.output: new}
                with editor.scratch():
                    checked = compare(found, new, editor) if compare else tuple(pairs.items())
                    for before, after in checked:
                        context.verify(denoiser, before, after, found.inputs, observe, found.output)
                for old, its_new in pairs.items():
                    replace_node(denoiser, old, its_new)
                context.tick()
                matches.append(record)
        clean(denoiser)
    return PassResult(program, tuple(matches), tuple(misses))


def replace_node(denoiser: Denoiser, old: Node, new: Node) -> None:
    """Lead every reader of `old` to `new`, the program's outputs included."""
    if any(user.op == "output" for user in old.users):
        denoiser.exported.graph_signature.replace_all_uses(old.name, new.name)
    old.replace_all_uses_with(new)


def clean(denoiser: Denoiser) -> None:
    """Remove what nothing reads any more: nodes, placeholders, weights."""
    graph = denoiser.graph
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not _mutates(node):
            graph.erase_node(node)
    for name in remove_unused_weights(denoiser.exported):
        denoiser.weights.pop(name, None)
    denoiser.graph_module.recompile()


def only_user(node: Node) -> Node | None:
    """The single reader of `node`, None when there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_call(node: Any, target: Callable[..., Any]) -> bool:
    """Whether `node` is a call of `target`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def named_args(node: Any) -> dict[str, Any]:
    """Arguments of an operator call by their names in its schema, defaults filled in."""
    schema = node.target._schema.arguments
    values = {argument.name: argument.default_value for argument in schema}
    values.update(zip(values, node.args, strict=False))
    values.update(node.kwargs)
    return values


def other_operand(node: Node, operand: Node) -> Any:
    """For a binary operator, the argument that is not `operand`."""
    left, right = node.args[:2]
    return right if left is operand else left


def dtype_of(node: Node) -> torch.dtype:
    """Dtype of a node's value."""
    return tensor_of(node).dtype


def tensor_of(node: Node) -> Tensor:
    """The fake tensor of a node.

    Raises:
        TypeError: the node's value is not one tensor.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise TypeError(f"node {node.name} is not a tensor but {type(value).__name__}")
    return value


def merge_results(program: Program, results: Sequence[PassResult]) -> PassResult:
    """One result for several rewrites that ran one after the other."""
    return PassResult(
        program,
        tuple(match for result in results for match in result.matches),
        tuple(miss for result in results for miss in result.near_misses),
    )


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
