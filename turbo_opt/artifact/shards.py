"""The layout of weights in safetensors shards, and the digest of one.

Shapes and dtypes are known before a byte is computed, so the header comes first and a shard is
written from its beginning to its end (`shard_writer`). Tensors therefore lie in the order in which
they are computed, as far as that leaves each of them aligned to its items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbo_opt.ir.files import dtype_code
from turbo_opt.ir.weights import LazyTensor, WeightStore

_HEADER_BYTES = 8
"""The header is a multiple of it, so that data behind it is aligned to items of any dtype."""


@dataclass(frozen=True)
class Shard:
    """One file to write.

    Attributes:
        file: path inside the artifact.
        weights: its tensors, in the order of the file.
        key: digest of names, expressions and layout: equal keys mean equal bytes.
        header: the first bytes of the file.
        nbytes: length of the file.
    """

    file: str
    weights: WeightStore
    key: str
    header: bytes
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
        plan_file(f"{stem}-{index:05d}-of-{len(bins):05d}.safetensors", WeightStore(tensors))
        for index, tensors in enumerate(bins, 1)
    ]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The data of a tensor, without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def sha256_of(path: Path) -> str:
    """Digest of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def plan_file(
    file: str, unordered: WeightStore, metadata: Mapping[str, str] | None = None
) -> Shard:
    """One file of a whole store.

    Args:
        metadata: what it says of itself besides its format, text by name.
    """
    weights = WeightStore({name: unordered[name] for name in _order(unordered)})
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, tensor in weights.items():
        entries[name] = {
            "dtype": dtype_code(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_BYTES)
    header = len(text).to_bytes(8, "little") + text
    key = hashlib.sha256(text + weights.digest().encode()).hexdigest()
    return Shard(file, weights, key, header, len(header) + offset)


def _order(weights: WeightStore) -> list[str]:
    """The names as they follow each other in the file, every tensor aligned to its items.

    By expression, and within one the largest output first: the others are kept until it is whole.
    Tensors that would leave others unaligned come last, by item size; an expression that has some
    of those beside others is computed for each.
    """
    groups = weights.names_by_producer()
    names = [name for group in groups for name in sorted(group, key=lambda n: -weights[n].nbytes)]
    unit = max((weights[name].dtype.itemsize for name in names), default=1)
    even = [name for name in names if weights[name].nbytes % unit == 0]
    odd = [name for name in names if weights[name].nbytes % unit]
    return even + sorted(odd, key=lambda name: -weights[name].dtype.itemsize)
