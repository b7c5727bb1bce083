"""A trained network as a diffusers folder that `turbo-opt run` compiles.

model/
  model_index.json
  transformer/          config.json and safetensors: diffusers' names, and what a pass reads
  vae, text_encoder …   links to the teacher's folder
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from turbo_opt.artifact.staging import sync
from turbo_opt.calibration.networks import DenoiserFolder, whole
from turbo_opt.calibration.training.world import World
from turbo_opt.checkpoints.names import is_kept_aside
from turbo_opt.errors import BadInput

SHARD_BYTES = 4 * 2**30
_STEM = "diffusion_pytorch_model"


def export_model(
    folder: DenoiserFolder,
    values: Mapping[str, Tensor],
    out: Path,
    dtype: torch.dtype,
    record: Mapping[str, object],
    world: World,
    shard_bytes: int = SHARD_BYTES,
    declared: Mapping[str, str] | None = None,
) -> Path:
    """Write `out`, replacing an earlier one, whole or not at all. All processes call.

    Args:
        folder: the teacher's; its other parts are linked to.
        values: the denoiser's parameters by name, whole or sharded.
        record: JSON values about how they were made; kept in the files' metadata.
        declared: what else the metadata says, for passes that ask.

    Raises:
        BadInput: `out` is there and not a model of ours.
    """
    partial = out.with_name(f".{out.name}.partial")
    if world.is_main:
        _check_free(out)
        shutil.rmtree(partial, ignore_errors=True)
        _write_frame(folder, partial)
    metadata = {"format": "pt", "turbo_opt": json.dumps(record), **(declared or {})}
    _write_weights(partial / folder.name, values, dtype, metadata, world, shard_bytes)
    if world.is_main:
        _sync_all(partial)
        aside = out.with_name(f".{out.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        if out.exists():
            os.rename(out, aside)
        os.rename(partial, out)
        sync(out.parent)
        shutil.rmtree(aside, ignore_errors=True)
    world.wait()
    return out


def _check_free(out: Path) -> None:
    if os.path.lexists(out) and not (out / "model_index.json").is_file():
        raise BadInput(f"{out}: exists and is no model folder; move it")


def _write_frame(folder: DenoiserFolder, out: Path) -> None:
    """Everything but the weights."""
    source = folder.pipeline.path
    (out / folder.name).mkdir(parents=True)
    shutil.copyfile(source / "model_index.json", out / "model_index.json")
    shutil.copyfile(folder.path / "config.json", out / folder.name / "config.json")
    for item in sorted(source.iterdir()):
        if item.is_dir() and item.name != folder.name:
            (out / item.name).symlink_to(item.resolve(), target_is_directory=True)


def _sync_all(folder: Path) -> None:
    """Wait until everything in a folder is on disk; what it links to is."""
    for place, _, files in os.walk(folder):
        for path in (*(Path(place, name) for name in files), Path(place)):
            sync(path)


def _write_weights(
    path: Path,
    values: Mapping[str, Tensor],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    world: World,
    shard_bytes: int,
) -> None:
    # Operators read the weights that only passes know in float32.
    dtypes = {name: torch.float32 if is_kept_aside(name) else dtype for name in values}
    sizes = {name: value.numel() * dtypes[name].itemsize for name, value in values.items()}
    shards = _plan(sizes, shard_bytes)
    weight_map = {}
    for index, names in enumerate(shards, start=1):
        file = f"{_STEM}.safetensors"
        if len(shards) > 1:
            file = f"{_STEM}-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            value = whole(values[name])
            if world.is_main:
                tensors[name] = value.to("cpu", dtypes[name]).contiguous()
            weight_map[name] = file
        if world.is_main:
            save_file(tensors, path / file, metadata=dict(metadata))
            (path / file).chmod(0o644)  # safetensors files are born private
    if world.is_main and len(shards) > 1:
        index_file = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (path / f"{_STEM}.safetensors.index.json").write_text(json.dumps(index_file, indent=1))


def _plan(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, in groups of at most `most` bytes, or of one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
