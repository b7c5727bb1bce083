"""The weights of one denoiser in a diffusers folder, checked against the graph, unread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from turbo_opt.checkpoints.folder import shards
from turbo_opt.checkpoints.names import diffusers_name, is_kept_aside
from turbo_opt.checkpoints.reader import listed
from turbo_opt.errors import BadInput, nearest
from turbo_opt.ir.files import SafetensorsFile
from turbo_opt.ir.weights import LazyTensor, WeightStore, cast, constant, from_file


@dataclass(frozen=True)
class Checkpoint:
    """What one denoiser's folder holds.

    Attributes:
        weights: a lazy tensor for every weight that the graph reads.
        unread: weights that it does not read, for passes: `<attention>.proj_l.{weight,bias}` of
            sparse-linear attention, under diffusers' module names.
    """

    weights: WeightStore
    unread: WeightStore


def open_checkpoint(
    folder: Path, expected: Mapping[str, Tensor], tables: Mapping[str, Tensor]
) -> Checkpoint:
    """A lazy tensor for every weight that a captured graph expects, and those kept for passes.

    Others are left out, as by diffusers.

    Args:
        folder: `transformer/` of a diffusers pipeline.
        expected: name → meta tensor with the shape and dtype that the graph was captured with;
            stored weights of another dtype are cast when read.
        tables: buffers that no checkpoint stores (rotary tables), computed at capture.

    Raises:
        BadInput: a shard or a weight is missing, truncated or of another shape.
    """
    return checkpoint_of(folder, _stored_tensors(folder), expected, tables)


def checkpoint_of(
    place: Path,
    stored: Mapping[str, LazyTensor],
    expected: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
) -> Checkpoint:
    """As `open_checkpoint`, of the tensors that are stored in `place`.

    Raises:
        BadInput: weights are missing, or one has another shape.
    """
    wanted = [name for name in expected if name not in tables]
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise BadInput(
            f"{place}: lacks {len(missing)} of {len(wanted)} weights: "
            f"{listed(missing)}{nearest(min(missing), stored)} (a shard is missing, or the weights "
            "are of another model)"
        )
    store = WeightStore()
    for name, meta in expected.items():
        if name in tables:
            store[name] = constant(tables[name])
            continue
        tensor = stored[name]
        if tensor.shape != tuple(meta.shape):
            raise BadInput(
                f"{place}: weight {name!r} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(meta.shape)}"
            )
        store[name] = cast(tensor, meta.dtype)
    return Checkpoint(store, _unread(stored, store))


def _unread(stored: Mapping[str, LazyTensor], read: Mapping[str, LazyTensor]) -> WeightStore:
    """The weights to keep aside; released SLA weights carry the names of the original Wan."""
    return WeightStore(
        {
            diffusers_name(name): tensor
            for name, tensor in stored.items()
            if is_kept_aside(name) and name not in read
        }
    )


def _stored_tensors(folder: Path) -> dict[str, LazyTensor]:
    stored = {}
    for path, keys in shards(folder):
        file = SafetensorsFile.open(str(path))
        for key in keys if keys is not None else file.keys():
            stored[key] = from_file(str(path), key)
    return stored


def storage_dtype(name: str, dtype: torch.dtype, keep_float32: Iterable[str]) -> torch.dtype:
    """The dtype that diffusers loads weight `name` in: some modules stay in float32.

    Source: `_keep_in_fp32_modules` of the model class, matched on whole path components.
    """
    if dtype in (torch.float16, torch.bfloat16) and set(name.split(".")) & set(keep_float32):
        return torch.float32
    return dtype
