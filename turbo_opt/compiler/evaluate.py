"""Run a piece of a captured graph on the CPU, with real weights and seeded inputs.

Symbolic sizes take small fixed values, so that a piece of a 14B model costs little
beyond reading its weights.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from turbo_opt.ir.edit import parameter_names, user_inputs
from turbo_opt.ir.program import Denoiser

_SIZES = (2, 2, 6, 6, 16)
"""Values of the symbolic sizes in order of appearance: batch, frames, rows, columns, text.
2·72 tokens, so that a whole and a ragged 128-row block both occur."""


class PieceEvaluator:
    """Evaluates nodes of one denoiser's graph between given inputs.

    Args:
        seed: inputs are unit Gaussian noise drawn from this seed and the node's name.
    """

    def __init__(self, denoiser: Denoiser, seed: int) -> None:
        self._denoiser = denoiser
        self._seed = seed
        self._weights: Mapping[Node, str] = {}
        self._sizes = _symbol_values(denoiser)

    def run(self, outputs: Sequence[Node], inputs: Iterable[Node]) -> list[Any]:
        """Values of `outputs`, computed from seeded values of `inputs` and the real weights.

        In-place writes into a needed buffer (`copy_` into a slice) are executed in graph order.
        """
        inputs = set(inputs)
        self._weights = parameter_names(self._denoiser.exported)
        values: dict[Node, Any] = {}
        self._computed: dict[str, Sequence[Tensor]] = {}
        for node in self._needed(outputs, inputs):
            values[node] = self._value(node, node in inputs, values)
        self._computed.clear()
        return [values[node] for node in outputs]

    def _value(self, node: Node, given: bool, values: Mapping[Node, Any]) -> Any:
        fake = node.meta.get("val")
        if isinstance(fake, (torch.SymInt, int)) and not isinstance(fake, bool):
            return self.concrete(fake)
        if node in self._weights:
            return self._weight(self._weights[node])
        if given or node.op == "placeholder":
            return self._random(node, fake)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _weight(self, name: str) -> Tensor:
        """A weight; values and scales of one quantization are computed once in a run."""
        tensor = self._denoiser.weights[name]
        if tensor.producer not in self._computed:
            self._computed[tensor.producer] = tensor.load_all()
        return self._computed[tensor.producer][tensor.output]

    def _random(self, node: Node, fake: Any) -> Any:
        if not isinstance(fake, Tensor):
            return fake
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(node.name.encode()))
        shape = [self.concrete(side) for side in fake.shape]
        if not fake.dtype.is_floating_point:
            return torch.randint(0, 8, shape, generator=generator, dtype=fake.dtype)
        return torch.randn(shape, generator=generator).to(fake.dtype)

    def concrete(self, size: Any) -> int:
        """The number that a symbolic size stands for here."""
        if isinstance(size, int):
            return size
        return int(size.node.expr.subs(self._sizes))

    def _needed(self, outputs: Sequence[Node], inputs: set[Node]) -> list[Node]:
        """Ancestors of `outputs` down to `inputs`, with the writes into them, in graph order."""
        wanted: set[Node] = set()
        stack = list(outputs)
        while stack:
            node = stack.pop()
            if node in wanted:
                continue
            wanted.add(node)
            if node in inputs or _is_size(node):
                continue
            stack.extend(node.all_input_nodes)
            stack.extend(_writes_into(node))
        return [node for node in self._denoiser.graph.nodes if node in wanted]


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def _writes_into(node: Node) -> list[Node]:
    """`copy_` calls that write to `node` through a slice of it."""
    return [
        write
        for view in node.users
        if view.target is torch.ops.aten.slice.Tensor
        for write in view.users
        if write.target is torch.ops.aten.copy_.default and write.args[0] is view
    ]


def _symbol_values(denoiser: Denoiser) -> dict[Any, int]:
    """A number for every symbol; one timestep per token where the model takes so many."""
    symbols: dict[Any, int] = {}
    tokens = math.prod(_SIZES[1:4])
    for node in user_inputs(denoiser.exported):
        for axis, side in enumerate(tensor_shape(node)):
            if isinstance(side, torch.SymInt):
                for symbol in sorted(side.node.expr.free_symbols, key=str):
                    if node.target == "timestep" and axis == 1:
                        symbols.setdefault(symbol, tokens)
                    order = sum(value != tokens for value in symbols.values())
                    symbols.setdefault(symbol, _SIZES[min(order, len(_SIZES) - 1)])
    return symbols


def tensor_shape(node: Node) -> Sequence[Any]:
    """Sides of a node's value; none where it is not a tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()
