"""Programs whose weights are exchanged, and pipelines that name checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers.variants import VARIANTS, captured_program
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.ir.program import Components, Program
from turbo_opt.passes._weights import learned_shapes


def run(program: Program, pipeline: str, verify: str = "off", **checkpoints: Path) -> Program:
    """The program after `pipeline`, in which `checkpoints` are known by name."""
    named = {name: str(path) for name, path in checkpoints.items()}
    planned = validate_pipeline(parse_pipeline(pipeline), checkpoints=named)
    return PassManager(planned, verification=Verification(verify)).run(program)


def program_of(variant: str, dtype: torch.dtype = torch.float32, experts: int = 1) -> Program:
    """A captured variant of random weights; with two experts, the second has the first's."""
    program = captured_program(VARIANTS[variant], dtype)
    if experts == 2:
        second = program.denoisers["transformer"].fork()
        second.name = "transformer_2"
        program.denoisers["transformer_2"] = second
        program.components = Components("random", "WanPipeline", {}, {"boundary_ratio": 0.875})
    return program


def random_weights(program: Program, seed: int, name: str = "transformer") -> dict[str, Tensor]:
    """Other values for all that a checkpoint of the network holds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = learned_shapes(program.denoisers[name])
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def weights_of(program: Program, name: str = "transformer") -> dict[str, Tensor]:
    """Every weight of a network, computed."""
    return {key: tensor.load() for key, tensor in program.denoisers[name].weights.items()}


def assert_weights(program: Program, expected: Mapping[str, Tensor], name: str) -> None:
    """The network has these weights, bit for bit, rounded to the graph's dtypes."""
    found = weights_of(program, name)
    for key, value in expected.items():
        assert torch.equal(found[key], value.to(found[key].dtype)), key


def part_of(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The first `count` tensors."""
    return dict(itertools.islice(tensors.items(), count))
