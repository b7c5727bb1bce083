"""A denoiser in stages: what sizes, prompt or timestep determine is computed once and kept.

    sizes → tables;  prompt → keys, values;  timestep → modulation;  x and all of these → velocity

Bit for bit the result of the whole graph. A tensor counts as unchanged while it is the same object
with the same version counter, shape and address, so writes that hide from autograd (`x.data[…] =`,
foreign code) are not seen. Weights are taken never to change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from turbo_opt.ir.stages import Split, Stage, StageInputs, split
from turbo_opt.runtime.cuda_graph import Backend, Recordings, StepGraphs, Values, merged

Key = tuple[Any, ...]
KeyFunction = Callable[[Sequence[Tensor]], Key | None]
"""From the inputs that a stage reads to what its values are known by; None where they cannot be."""

_LATENTS = "hidden_states"
_MOST_SHAPES = 2
_MOST_PROMPTS = 4
MOST_TIMESTEPS = 16
"""Noise levels whose values a network keeps."""


class StagedGraph:
    """A whole graph, run in stages.

    Args:
        graph: takes tensors by name, gives a tuple whose first item is the velocity.
        stages: which of its inputs define a stage.
        backend: records steps; None launches every step anew.

    Attributes:
        graphs: the recorded steps; None without a backend.
        loops: recorded clips whose first step is this network's, see `loop_graph`; None likewise.
        unstaged_inputs: names of the inputs besides the latents that the step itself reads.
    """

    def __init__(self, graph: GraphModule, stages: StageInputs, backend: Backend | None) -> None:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        found = split(graph.graph, inputs, stages)
        self._shape = _KeptStage(cut(graph, found, Stage.SHAPE), _shapes, _MOST_SHAPES)
        self._prompt = _KeptStage(cut(graph, found, Stage.PROMPT), _identities, _MOST_PROMPTS)
        self._timestep = _KeptStage(cut(graph, found, Stage.TIMESTEP), _numbers, MOST_TIMESTEPS)
        self._step = cut(graph, found, Stage.STEP)
        self._arguments = _arguments(self._step)
        names = {_name(node) for node in inputs} - {_LATENTS}
        self.unstaged_inputs = [name for name in self._arguments if name in names]
        self.graphs = StepGraphs(self.velocity, backend) if backend is not None else None
        self.loops = (
            Recordings(backend, "loop", "clips are made step by step")
            if backend is not None
            else None
        )

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        """The velocity.

        Args:
            given: every input by name. A timestep on the CPU is known by its value, which costs
                nothing to read there; on a GPU only the same tensor is known again.
        """
        latents = Values({_LATENTS: given[_LATENTS]})
        sources = [latents, self.unstaged(given), *self.kept(given)]
        if self.graphs is not None:
            return self.graphs(sources)
        return self.velocity(**merged(source.by_name for source in sources))

    def kept(self, given: Mapping[str, Tensor]) -> list[Values]:
        """What sizes, prompt and timestep determine, computed now or before."""
        shape = self._shape(given)
        return [shape, self._prompt(given, shape), self._timestep(given, shape)]

    def unstaged(self, given: Mapping[str, Tensor]) -> Values:
        """The inputs besides the latents that the step itself reads: `unstaged_inputs`."""
        return Values(_tensors(given, self.unstaged_inputs))

    def velocity(self, **values: Any) -> Tensor:
        """The step itself.

        Args:
            values: the latents as `hidden_states`, and those of `unstaged` and `kept`.
        """
        arguments = {name: values[name] for name in self._arguments}
        return self._step(**arguments)[0]  # type: ignore[no-any-return]


def cut(whole: GraphModule, found: Split, stage: Stage) -> GraphModule:
    """One stage of `whole` as a module that shares its weights.

    It takes inputs and kept values of other stages by name, and gives its own kept values as a dict
    by name; the step gives what the whole graph does.
    """
    nodes = found.nodes[stage]
    (output,) = (node for node in whole.graph.nodes if node.op == "output")
    results = list(output.args[0]) if stage == Stage.STEP else list(found.kept[stage])
    graph, inside = Graph(), set(nodes)
    read = (source for node in nodes for source in node.all_input_nodes)
    copies: dict[Node, Node] = {
        node: graph.placeholder(_name(node))
        for node in dict.fromkeys([*read, *results])
        if node not in inside
    }
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    if stage == Stage.STEP:
        graph.output(tuple(copies[node] for node in results))
    else:
        graph.output({_name(node): copies[node] for node in results})
    return GraphModule(whole, graph, class_name=f"{stage.capitalize()}Stage")


class _KeptStage:
    """A stage with the values of the last few keys."""

    def __init__(self, module: GraphModule, key: KeyFunction, most: int) -> None:
        self._module = module
        self._arguments = _arguments(module)
        self._key = key
        self._most = most
        self._kept: list[tuple[Key, Values]] = []

    def __call__(self, given: Mapping[str, Tensor], shape: Values | None = None) -> Values:
        """The stage's values for these inputs, computed now or before.

        Args:
            shape: values of the shape stage, for the other two.
        """
        earlier = shape.by_name if shape is not None else {}
        taken = {name: earlier[name] for name in self._arguments if name in earlier}
        key = self._key([given[name] for name in self._arguments if name in given])
        if key is not None and taken:
            key = (*key, *_shapes(list(given.values())))
        self._kept = [item for item in self._kept if all(map(_is_alive, item[0]))]
        for index, (known, values) in enumerate(self._kept):
            if known == key:
                self._kept.insert(0, self._kept.pop(index))
                return values
        values = Values(self._module(**_tensors(given, self._arguments), **taken))
        if key is not None:
            self._kept.insert(0, (key, values))
            del self._kept[self._most :]
        return values


class _Unchanged:
    """Equal to another as long as both stand for the same tensor with the same content."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self._state = (tensor._version, tensor.shape, tensor.data_ptr())

    def __eq__(self, other: object) -> bool:
        mine = self.tensor()
        return (
            isinstance(other, _Unchanged)
            and mine is not None
            and mine is other.tensor()
            and self._state == other._state
        )


def _shapes(tensors: Sequence[Tensor]) -> Key:
    return tuple(tensor.shape for tensor in tensors)


def _identities(tensors: Sequence[Tensor]) -> Key | None:
    if any(tensor.is_inference() for tensor in tensors):
        return None  # they carry no version counter, so a change would not be seen
    return tuple(_Unchanged(tensor) for tensor in tensors)


def _numbers(tensors: Sequence[Tensor]) -> Key | None:
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return tuple(tuple(tensor.flatten().tolist()) for tensor in tensors)
    return _identities(tensors)


def _is_alive(part: Any) -> bool:
    return not isinstance(part, _Unchanged) or part.tensor() is not None


def _tensors(given: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Those of `names` that are inputs, as the graph takes them.

    The timestep is copied: what is known by its value must not follow the caller's tensor.
    """

    def cast(timestep: Tensor) -> Tensor:
        return timestep.to(given[_LATENTS].device, torch.float32, copy=True)

    return {
        name: cast(given[name]) if name == "timestep" else given[name]
        for name in names
        if name in given
    }


def _arguments(module: GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]


def _name(node: Node) -> str:
    return str(node.target) if node.op == "placeholder" else node.name
