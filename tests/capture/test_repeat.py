"""A capture that traces one block and repeats it is the capture that traces them all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tests.helpers.variants import VARIANTS
from turbo_opt.capture import export
from turbo_opt.capture.repeat import expand, repeated_blocks
from turbo_opt.ir.edit import module_path, parameter_names
from turbo_opt.ir.printer import graph_text

aten = torch.ops.aten
DEEPER: dict[str, dict[str, Any]] = {
    "t2v": {"num_layers": 3},
    "vace": {"num_layers": 2, "vace_layers": [0, 1]},
}


@pytest.mark.parametrize("name", DEEPER)
def test_a_wan_model_is_captured_as_if_every_block_was_traced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = VARIANTS[name]
    arguments = (
        variant.model_class, {**variant.config, **DEEPER[name]}, torch.bfloat16,
        variant.expand_timesteps,
    )  # fmt: skip
    repeated = export.export_denoiser(*arguments).exported
    monkeypatch.setattr(export, "repeated_blocks", contextlib.nullcontext)
    monkeypatch.setattr(export, "expand", lambda exported: exported)
    whole = export.export_denoiser(*arguments).exported
    assert graph_text(repeated, stable=True) == graph_text(whole, stable=True)
    assert _modules(repeated) == _modules(whole)
    assert list(parameter_names(repeated).values()) == list(parameter_names(whole).values())
    assert list(repeated.state_dict) == list(whole.state_dict)
    assert repeated.range_constraints == whole.range_constraints
    repeated.validate()


class Block(nn.Module):
    """x → linear(norm(x)) · scale + shift."""

    def __init__(self, size: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=eps)
        self.linear = nn.Linear(size, size)
        self.scale = 2.0

    def forward(self, x: Tensor, shift: Tensor, twice: bool = False) -> Tensor:
        x = self.linear(self.norm(x)) * self.scale + shift
        return x + x if twice else x


class Model(nn.Module):
    """Four blocks, one after the other, as `step` says."""

    def __init__(
        self, step: Callable[[int, nn.Module, Tensor, Tensor], Tensor], blocks: list[Block]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._step = step

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = self._step(index, block, x, shift)
        return x


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The norms that were really run."""
    norms: list[nn.Module] = []
    honest = nn.LayerNorm.forward
    monkeypatch.setattr(
        nn.LayerNorm, "forward", lambda self, x: norms.append(self) or honest(self, x)
    )
    return norms


def test_blocks_that_equal_the_first_are_not_traced(traced: list[nn.Module]) -> None:
    _compare(Model(_plain, [Block() for _ in range(4)]), traced, ["blocks.0"])


def test_a_block_with_another_setting_is_traced_and_keeps_it(traced: list[nn.Module]) -> None:
    blocks = [Block(), Block(), Block(eps=1e-3), Block()]
    blocks[3].scale = 3.0
    _compare(Model(_plain, blocks), traced, ["blocks.0", "blocks.2", "blocks.3"])


def test_a_block_with_weights_of_another_dtype_is_traced(traced: list[nn.Module]) -> None:
    blocks = [Block() for _ in range(4)]
    blocks[2].norm.double()

    def step(index: int, block: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
        return block(x.double(), shift.double()).float() if index == 2 else block(x, shift)

    blocks[2].linear.double()
    _compare(Model(step, blocks), traced, ["blocks.0", "blocks.2"])


def test_a_block_that_is_called_with_other_settings_is_traced(traced: list[nn.Module]) -> None:
    model = Model(
        lambda index, block, x, shift: block(x, shift, twice=index == 2),
        [Block() for _ in range(4)],
    )
    _compare(model, traced, ["blocks.0", "blocks.2"])


def test_a_block_that_is_given_another_layout_is_traced(traced: list[nn.Module]) -> None:
    def step(index: int, block: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
        return block(x, shift.expand_as(x) if index == 1 else shift)

    _compare(Model(step, [Block() for _ in range(4)]), traced, ["blocks.0", "blocks.1"])


def test_a_first_block_that_runs_twice_and_a_last_that_runs_first(traced: list[nn.Module]) -> None:
    def step(index: int, block: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
        return model.blocks[(3, 0, 0, 1)[index]](x, shift)

    model = Model(step, [Block() for _ in range(4)])
    _compare(model, traced, ["blocks.3", "blocks.0", "blocks.0"])


def _plain(index: int, block: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
    return block(x, shift)


def _compare(model: Model, traced: list[nn.Module], expected: list[str]) -> None:
    """Blocks `expected` are traced, and the graph computes what the model does."""
    inputs = torch.randn(3, 8), torch.randn(8)
    shapes = {0: Dim("rows", min=2)}, None
    with torch.no_grad(), repeated_blocks(model):
        marked = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    paths = {module: path.removesuffix(".norm") for path, module in model.named_modules()}
    assert [paths[norm] for norm in traced] == expected
    assert all("forward" not in vars(block) for block in model.blocks)
    program = expand(marked)
    program.validate()
    assert not any("mark" in str(node.target) for node in program.graph.nodes)
    norms = [node for node in program.graph.nodes if node.target is aten.layer_norm.default]
    assert len(norms) == 4
    rows = torch.randn(5, 8)
    with torch.no_grad():
        values = [*program.state_dict.values(), rows, inputs[1]]
        (result,) = program.graph_module(*values)
        assert torch.equal(result, model(rows, inputs[1]))


def _modules(exported: ExportedProgram) -> list[str]:
    return [module_path(node) for node in exported.graph.nodes]
