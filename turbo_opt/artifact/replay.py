"""A small input and the output it gave: proof, wherever an artifact lands, that it computes the
same there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.export import ExportedProgram

from turbo_opt.artifact.manifest import inside
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.files import SafetensorsFile
from turbo_opt.ir.printer import op_counts
from turbo_opt.runtime.module import CompiledTransformer

_MIN_SQNR_DB = {torch.float32: 50.0, torch.float16: 25.0, torch.bfloat16: 20.0}
_MIN_SQNR_DB_OWN_OPERATORS = 20.0
_SIZES = {0: 1, 2: 2, 3: 4, 4: 6}
"""Values of the symbols in the sides of `hidden_states`: batch, frames, rows, columns."""
_TEXT_TOKENS = 8
_OUTPUT = "output"


def min_sqnr_db(exported: ExportedProgram) -> float:
    """How close another machine must come over the whole network, in dB.

    Rounding differs everywhere once a reduction is ordered otherwise, and with operators of ours
    quantization steps and block choices flip with it; a wrong weight or kernel leaves a few dB.
    """
    if any(name.startswith("turbo_opt.") for name in op_counts(exported)):
        return _MIN_SQNR_DB_OWN_OPERATORS
    return _MIN_SQNR_DB[user_inputs(exported)[0].meta["val"].dtype]


def replay_inputs(
    exported: ExportedProgram, patch: tuple[int, ...], seed: int = 0
) -> dict[str, Any]:
    """Seeded inputs of a captured graph at a small size, on the CPU.

    Args:
        patch: patch size along frames, height and width.
    """
    nodes = {str(node.target): node.meta["val"] for node in user_inputs(exported)}
    sizes: dict[Any, int] = {}
    _bind(nodes["hidden_states"], _SIZES, sizes)
    video = _shape(nodes["hidden_states"], sizes)[2:]
    tokens = math.prod(side // size for side, size in zip(video, patch, strict=True))
    _bind(nodes["timestep"], {1: tokens}, sizes)
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {}
    for name, fake in nodes.items():
        _bind(fake, {}, sizes)
        shape = _shape(fake, sizes)
        if name == "timestep":
            value = torch.full(shape, 500.0)
        else:
            value = torch.randn(shape, generator=generator)
        inputs[name] = value.to(fake.dtype)
    return inputs


def run_replay(transformer: CompiledTransformer, inputs: Mapping[str, Tensor]) -> Tensor:
    """The network's output for `inputs`, moved to its device and back."""
    given = {name: value.to(transformer.device) for name, value in inputs.items()}
    with torch.no_grad():
        return transformer(**given, return_dict=False)[0].cpu()  # type: ignore[no-any-return]


def replay_bytes(inputs: Mapping[str, Tensor], output: Tensor) -> bytes:
    """Content of the replay file."""
    tensors = {f"input.{name}": value.contiguous() for name, value in inputs.items()}
    return safetensors_bytes({**tensors, _OUTPUT: output.contiguous()})


def read_replay(root: Path, file: str) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs, output) of a replay file.

    Raises:
        BadInput: it is damaged.
    """
    stored = SafetensorsFile.open(str(inside(root, file)))
    names = [key for key in stored.keys() if key.startswith("input.")]  # noqa: SIM118
    return {key.removeprefix("input."): stored.read(key) for key in names}, stored.read(_OUTPUT)


@dataclass(frozen=True)
class ReplayResult:
    """How the output here compares with the stored one.

    Attributes:
        same_environment: torch, processor and threads are those that made the artifact.
    """

    denoiser: str
    sqnr_db: float
    bitwise: bool
    same_environment: bool
    min_sqnr_db: float

    @property
    def passed(self) -> bool:
        """Bit for bit in the same environment, close enough in any other."""
        return self.bitwise if self.same_environment else self.sqnr_db >= self.min_sqnr_db


def compare_replay(
    denoiser: str, expected: Tensor, found: Tensor, *, same_environment: bool, min_sqnr_db: float
) -> ReplayResult:
    """Judge the output of a replay.

    Raises:
        BadInput: it has another shape than the stored one.
    """
    if expected.shape != found.shape:
        raise BadInput(
            f"denoiser {denoiser!r}: the replay gave {list(found.shape)}, "
            f"stored is {list(expected.shape)}"
        )
    return ReplayResult(
        denoiser,
        sqnr_db(expected, found),
        torch.equal(expected, found),
        same_environment,
        min_sqnr_db,
    )


def _bind(fake: Tensor, values: Mapping[int, int], sizes: dict[Any, int]) -> None:
    for axis, side in enumerate(fake.shape):
        if isinstance(side, torch.SymInt):
            for symbol in sorted(side.node.expr.free_symbols, key=str):
                sizes.setdefault(symbol, values.get(axis, _TEXT_TOKENS))


def _shape(fake: Tensor, sizes: Mapping[Any, int]) -> list[int]:
    return [
        int(side.node.expr.subs(sizes)) if isinstance(side, torch.SymInt) else side
        for side in fake.shape
    ]
