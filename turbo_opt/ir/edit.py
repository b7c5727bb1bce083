"""Edits of an exported program that keep graph, signature and state in step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)
from torch.fx import Graph, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_arg

_WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER)


def parameter_names(exported: ExportedProgram) -> dict[Node, str]:
    """Placeholder → parameter or buffer name, in graph order."""
    names = {
        spec.arg.name: spec.target
        for spec in exported.graph_signature.input_specs
        if spec.kind in _WEIGHT_KINDS and spec.target is not None
    }
    return {node: names[node.name] for node in _placeholders(exported) if node.name in names}


def user_inputs(exported: ExportedProgram) -> list[Node]:
    """Placeholders of the tensors a caller passes, in order."""
    wanted = set(exported.graph_signature.user_inputs)
    return [node for node in _placeholders(exported) if node.name in wanted]


def add_weight(
    exported: ExportedProgram, name: str, shape: Sequence[int], dtype: torch.dtype
) -> Node:
    """Add a buffer placeholder `name` (meta, persistent) before the caller's inputs.

    Raises:
        ValueError: there is a parameter or buffer of that name already.
    """
    if name in exported.state_dict:
        raise ValueError(f"the graph has a weight {name!r} already")
    signature = exported.graph_signature
    position = len(signature.input_specs)
    while position and signature.input_specs[position - 1].kind not in _WEIGHT_KINDS:
        position -= 1
    fake_mode = _fake_mode(exported)
    with exported.graph.inserting_before(_placeholders(exported)[position]):
        node = exported.graph.placeholder("b_" + name.replace(".", "_"))
    meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
    node.meta["val"] = fake_mode.from_tensor(meta, static_shapes=True)
    spec = InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True)
    signature.input_specs.insert(position, spec)
    exported.state_dict[name] = meta
    return node


def remove_unused_weights(exported: ExportedProgram) -> list[str]:
    """Drop parameter and buffer placeholders that nothing reads; their names."""
    removed = []
    for node, name in parameter_names(exported).items():
        if not node.users:
            exported.graph.erase_node(node)
            specs = exported.graph_signature.input_specs
            specs.remove(next(spec for spec in specs if spec.target == name))
            exported.state_dict.pop(name, None)
            removed.append(name)
    return removed


def insert_call(
    exported: ExportedProgram,
    before: Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> Node:
    """Insert `target(*args, **kwargs)` before a node and give it a value of the right shape.

    The fake value is computed by running the op on the arguments' fake values, so the result's
    dtype, strides and symbolic shape are those that the op really has. Calls alike in different
    blocks share one.
    """
    kwargs = kwargs or {}
    graph = exported.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    values = map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = _fake_result(_fake_mode(exported), target, *values)
    for key in ("nn_module_stack", "stack_trace"):
        if key in before.meta:
            node.meta[key] = before.meta[key]
    return node


def dependents(node: Node, until: Node) -> list[Node]:
    """The nodes between `node` and `until` that follow from `node`, in graph order."""
    found: list[Node] = []
    known = {node}
    current = node.next
    while current is not until:
        if not known.isdisjoint(current.all_input_nodes):
            known.add(current)
            found.append(current)
        current = current.next
    return found


def copy_exported(exported: ExportedProgram) -> ExportedProgram:
    """A copy with its own graph and signature; fake values are shared, they never change."""
    return with_graph(
        exported, copy.deepcopy(exported.graph), copy.deepcopy(exported.graph_signature)
    )


def with_graph(
    exported: ExportedProgram, graph: Graph, signature: ExportGraphSignature
) -> ExportedProgram:
    """The same program over another graph, with a state of its own.

    The graph is not checked, and no Python is generated for it until it is called: both take longer
    than most passes, and programs are copied for every pass.
    """
    graph_module = _LazyGraphModule({}, graph)
    graph_module.meta.update(exported.graph_module.meta)
    made = copy.copy(exported)
    made._graph_module = graph_module
    made._graph_signature = signature
    made._state_dict = dict(exported.state_dict)
    made._range_constraints = copy.copy(exported.range_constraints)
    made._constants = dict(exported.constants)
    return made


def module_path(node: Node) -> str:
    """The module a node was traced in, such as `blocks.3.attn1`; empty at the top."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return path.removeprefix("L['self']").lstrip(".")


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_NEW_SIZES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def _fake_result(fake_mode: Any, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    # Kept with the mode, because the results refer to it: they live as long as it does.
    known = vars(fake_mode).setdefault("_turbo_opt_results", {})
    call = target, _described(args), _described(kwargs)
    if call not in known:
        with fake_mode:
            result = target(*args, **kwargs)
        if not _NEW_SIZES.isdisjoint(getattr(target, "tags", ())):
            return result
        known[call] = result
    return known[call]


def _described(item: Any) -> Any:
    """All of an argument that the description of a result depends on, as a key."""
    if isinstance(item, dict):
        return tuple((key, _described(value)) for key, value in item.items())
    if isinstance(item, list | tuple):
        return tuple(map(_described, item))
    if isinstance(item, torch.Tensor):
        sizes = (*item.shape, *item.stride(), item.storage_offset())
        return item.ndim, tuple(map(_expression, sizes)), item.dtype, item.device
    return type(item), _expression(item)


def _expression(side: Any) -> Any:
    return side.node.expr if isinstance(side, _SYMBOLIC) else side


def _placeholders(exported: ExportedProgram) -> list[Node]:
    return list(exported.graph.find_nodes(op="placeholder"))


def _fake_mode(exported: ExportedProgram) -> Any:
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    raise ValueError("the graph holds no fake tensor, so it was not made by torch.export")
