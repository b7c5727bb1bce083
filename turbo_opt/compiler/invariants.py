"""Structural verification: what must hold of a Program after every pass."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from turbo_opt.errors import PassFailed
from turbo_opt.ir.program import Denoiser, Program


def check_invariants(program: Program) -> None:
    """torch's own verifier, and that graph, signature and weight store agree.

    Raises:
        PassFailed: one of them does not hold, with the denoiser and the name.
    """
    names = {step.denoiser for step in program.schedule.steps}
    for name in sorted(names - program.denoisers.keys()):
        raise PassFailed(f"the schedule runs the denoiser {name!r}, which does not exist")
    for denoiser in program:
        _check_graph(denoiser)
        _check_weights(denoiser)


def _check_graph(denoiser: Denoiser) -> None:
    try:
        denoiser.graph.lint()
        denoiser.exported.validate()
    except Exception as error:
        raise PassFailed(f"{denoiser.name}: the graph is not valid any more: {error}") from error
    for node in denoiser.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and _gives_something(node):
            raise PassFailed(f"{denoiser.name}: node {node.name} has no value description")


def _gives_something(node: Node) -> bool:
    """Whether a call has a result: asserts have none, and lose their empty one when stored."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.returns)


def _check_weights(denoiser: Denoiser) -> None:
    placeholders = denoiser.parameters()
    wanted, stored = set(placeholders.values()), set(denoiser.weights)
    if wanted != stored:
        name = min(wanted ^ stored)
        where = "the graph but not the weights" if name in wanted else "the weights but not read"
        raise PassFailed(f"{denoiser.name}: {name!r} is in {where}")
    for node, name in placeholders.items():
        value, tensor = node.meta["val"], denoiser.weights[name]
        assert isinstance(value, Tensor)
        if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
            raise PassFailed(
                f"{denoiser.name}: weight {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"the graph reads {value.dtype} {list(value.shape)}"
            )
