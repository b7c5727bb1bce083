"""Checkpoints of every layout in circulation, written from tensors under diffusers' names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from turbo_opt.checkpoints.names import original_name

Tensors = Mapping[str, Tensor]


def in_original_names(tensors: Tensors) -> dict[str, Tensor]:
    """`tensors` under the names of the original Wan."""
    renamed = {original_name(name): tensor for name, tensor in tensors.items()}
    assert None not in renamed
    return renamed  # type: ignore[return-value]


def with_linear_patch_embedding(tensors: Tensors) -> dict[str, Tensor]:
    """As rCM has it: the patch embedding is a linear layer (dim, channels·patch)."""
    flat = dict(tensors)
    for name in ("patch_embedding.weight", "vace_patch_embedding.weight"):
        if name in flat:
            flat[name] = flat[name].flatten(1)
    return flat


def prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """`tensors` with `prefix` before every name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write_safetensors(path: Path, tensors: Tensors, **metadata: str) -> Path:
    """A file of contiguous copies."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def write_sharded_folder(folder: Path, tensors: Tensors) -> Path:
    """Two shards with an index, as diffusers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-0000{index}-of-00002.safetensors"
        write_safetensors(folder / shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_layout(layout: str, path: Path, tensors: Tensors) -> Path:
    """Write `tensors` as `layout` has them, at `path` with the right suffix; where they are."""
    original = in_original_names(tensors)
    flat = with_linear_patch_embedding(original)
    if layout == "diffusers":
        return write_safetensors(path.with_suffix(".safetensors"), tensors)
    if layout == "diffusers-folder":
        return write_sharded_folder(path, tensors)
    if layout == "original":
        return write_safetensors(path.with_suffix(".safetensors"), original)
    if layout == "comfyui":
        comfy = prefixed("model.diffusion_model.", original)
        return write_safetensors(path.with_suffix(".safetensors"), comfy)
    content: Any = flat if layout == "turbodiffusion" else prefixed("net.", flat)
    if layout == "training-dump":
        content = {"state_dict": content, "iteration": 100}
    torch.save(content, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


LAYOUTS = (
    "diffusers",
    "diffusers-folder",
    "original",
    "comfyui",
    "turbodiffusion",
    "rcm",
    "training-dump",
)


def projections(layers: int, seed: int = 9) -> dict[str, Tensor]:
    """`proj_l` of every self-attention, float32, under diffusers' module names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"blocks.{layer}.attn1.proj_l.{part}": torch.randn(shape, generator=generator)
        for layer in range(layers)
        for part, shape in (("weight", (128, 128)), ("bias", (128,)))
    }
