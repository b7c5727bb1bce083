"""Weights of a diffusers folder against what a graph expects of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from turbo_opt.capture.checkpoint import open_checkpoint
from turbo_opt.errors import BadInput


def test_all_missing_weights_are_counted_and_the_first_named(tmp_path: Path) -> None:
    save_file({"layer.0": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    expected = {f"layer.{index}": torch.empty(2, device="meta") for index in range(9)}
    tables = {"layer.8": torch.ones(2)}
    with pytest.raises(BadInput) as refused:
        open_checkpoint(tmp_path, expected, tables)
    assert "lacks 7 of 8 weights: layer.1, layer.2, layer.3, layer.4, layer.5 and 2 more" in str(
        refused.value
    )
