"""The layout of weights in safetensors shards, and the digest of one.

Shapes and dtypes are known before a byte is computed, so the header comes first and every tensor
is written to its place as it is computed (`shard_writer`): in the order of the expressions, which
is not the order in the file (the format's own writer sorts by item size, which keeps every tensor
aligned).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbo_opt.ir.files import dtype_code
from turbo_opt.ir.weights import LazyTensor, WeightStore

_CHUNK = 64 * 2**20


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in a shard file."""

    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Shard:
    """One file to write.

    Attributes:
        file: path inside the artifact.
        weights: its tensors, in the order they are computed.
        key: digest of names, expressions and layout: equal keys mean equal bytes.
        header: the first bytes of the file.
        places: absolute position of every tensor.
        nbytes: length of the file.
    """

    file: str
    weights: WeightStore
    key: str
    header: bytes
    places: Mapping[str, Place]
    nbytes: int


def plan_shards(weights: WeightStore, stem: str, max_bytes: int) -> list[Shard]:
    """Cut a store into files of at most `max_bytes` of data, in order.

    Outputs of one expression (values and scales) stay together, so that it is computed once; one
    that alone exceeds the limit gets a file of its own.
    """
    bins: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for names in weights.names_by_producer():
        group = {name: weights[name] for name in names}
        size = sum(tensor.nbytes for tensor in group.values())
        if bins[-1] and filled + size > max_bytes:
            bins.append({})
            filled = 0
        bins[-1].update(group)
        filled += size
    return [
        _plan(f"{stem}-{index:05d}-of-{len(bins):05d}.safetensors", WeightStore(tensors))
        for index, tensors in enumerate(bins, 1)
    ]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The data of a tensor, without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def write_at(handle: int, data: memoryview, position: int) -> None:
    """Write all of `data` to a place in a file; threads may do so side by side."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + _CHUNK], position + done)


def sha256_of(path: Path, *, flush: bool = False) -> str:
    """Digest of a file's content.

    Args:
        flush: also wait until the file is on disk, to which it is written meanwhile.
    """
    with open(path, "rb") as handle, ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(os.fsync, handle.fileno()) if flush else None
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if flushed is not None:
            flushed.result()
        return digest


def _plan(file: str, weights: WeightStore) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    offset = 0
    for name in sorted(weights, key=lambda n: (-weights[n].dtype.itemsize, n)):
        tensor = weights[name]
        offsets[name] = offset
        entries[name] = {
            "dtype": dtype_code(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = {
        name: Place(len(header) + begin, weights[name].shape, weights[name].dtype)
        for name, begin in offsets.items()
    }
    key = hashlib.sha256(text + weights.digest().encode()).hexdigest()
    return Shard(file, weights, key, header, places, len(header) + offset)
