"""Small graphs written by hand, to show a pass before and after.

A function of tensors is exported; parameters are given as a dict of meta-like tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import Node

from turbo_opt.ir.printer import op_name
from turbo_opt.ir.program import Components, Denoiser, Program
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.weights import WeightStore, constant


def program_of(function: Callable[..., Tensor], *inputs: Tensor, **weights: Tensor) -> Program:
    """A program whose one denoiser is `function(*inputs, **weights)`, first axis dynamic."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in weights.items():
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

        def forward(self, *arguments: Tensor) -> Tensor:
            return function(*arguments, **{name: getattr(self, name) for name in weights})

    return _exported(Wrapped(), inputs, weights)


def program_of_module(module: nn.Module, *inputs: Tensor) -> Program:
    """A program whose one denoiser is `module`, traced on meta, weights under their names."""
    weightless = copy.deepcopy(module).to("meta")
    meta = tuple(tensor.to("meta") for tensor in inputs)
    return _exported(weightless, meta, dict(module.state_dict()))


def _exported(
    module: nn.Module, inputs: tuple[Tensor, ...], weights: Mapping[str, Tensor]
) -> Program:
    exported = torch.export.export(module, inputs, strict=False)
    for name, value in weights.items():
        exported.state_dict[name] = nn.Parameter(value.to("meta"), requires_grad=False)
    store = WeightStore({name: constant(value) for name, value in weights.items()})
    denoiser = Denoiser("net", exported, store, "Wrapped", {})
    return Program({"net": denoiser}, Schedule(()), Components("test", "Test", {}))


def ops_of(program: Program) -> list[str]:
    """Operators of the only denoiser in order, tuple items left out."""
    (denoiser,) = program
    names = [op_name(n.target) for n in denoiser.graph.nodes if n.op == "call_function"]
    return [name for name in names if name != "getitem"]


def calls_of(program: Program, name: str) -> list[Node]:
    """Calls of one operator in the only denoiser, in order."""
    (denoiser,) = program
    calls = [node for node in denoiser.graph.nodes if node.op == "call_function"]
    return [node for node in calls if op_name(node.target) == name]


def reasons_of(program: Program) -> list[str]:
    """Reasons of the last pass's near misses."""
    return [miss["reason"] for miss in program.history[-1]["near_misses"]]
