"""What the passes that exchange weights share: names, places in the program, records.

A weight of a source goes to the weight of that name in the graph, or, where the graph reads none,
is kept aside for passes that may want it (`Denoiser.unread`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from turbo_opt.checkpoints.names import is_kept_aside
from turbo_opt.checkpoints.reader import fitted, listed
from turbo_opt.compiler.base import Match
from turbo_opt.errors import BadInput
from turbo_opt.ir.program import Denoiser
from turbo_opt.ir.weights import LazyTensor, cast


def learned_shapes(denoiser: Denoiser) -> dict[str, tuple[int, ...]]:
    """The weights that a checkpoint of this network holds, with their shapes.

    Tables that are computed at capture are not among them.
    """
    parameters = set(denoiser.exported.graph_signature.parameters)
    return {
        name: tensor.shape
        for name, tensor in denoiser.weights.items()
        if name in parameters or is_kept_aside(name)
    }


def fit_to_graph(
    what: str, tensors: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LazyTensor]:
    """Those of `tensors` that the graph reads, in its shapes.

    Raises:
        BadInput: shapes differ; all of them are told.
    """
    found, wrong = {}, []
    for name, shape in shapes.items():
        if name in tensors:
            tensor = fitted(name, tensors[name], shape)
            if tensor is None:
                wrong.append(f"{name} is {list(tensors[name].shape)} instead of {list(shape)}")
            else:
                found[name] = tensor
    if wrong:
        raise BadInput(f"{what}: {len(wrong)} weights are of other shapes: {listed(wrong)}")
    return found


def put(denoiser: Denoiser, name: str, tensor: LazyTensor) -> None:
    """Make `tensor` the weight `name`, in the graph's dtype, or keep it aside."""
    if name in denoiser.weights:
        denoiser.weights[name] = cast(tensor, denoiser.weights[name].dtype)
    else:
        denoiser.unread[name] = tensor


def matches_of(denoiser: Denoiser, names: Iterable[str]) -> Sequence[Match]:
    """One match for each weight; those kept aside have no node."""
    nodes = {name: node.name for node, name in denoiser.parameters().items()}
    return [Match(denoiser.name, nodes.get(name, name), name.rpartition(".")[0]) for name in names]
