"""Safetensors files, read one tensor at a time and never trusted.

The header is checked against the file before a byte of data is used: offsets in range and in
order, sizes that follow from shape and dtype. Tensors are read with positioned reads rather than
a memory map, so that the resident set of the process stays at one tensor.
Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON
header, data).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbo_opt.errors import BadInput, nearest
from turbo_opt.ir.disk import read_bytes, read_into

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100 * 2**20
_METADATA = "__metadata__"
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 2**10


def dtype_code(dtype: torch.dtype) -> str:
    """The format's name of a dtype: `torch.bfloat16` → `"BF16"`."""
    return _CODES[dtype]


class SafetensorsFile:
    """The header of one file, and reads of its tensors by key.

    Attributes:
        metadata: what the file says of itself, text by name.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._header, self._data_start = _read_header(Path(path))
        self.metadata: Mapping[str, str] = _metadata(self._header)

    @classmethod
    def open(cls, path: str) -> SafetensorsFile:
        """The file at `path`; headers are kept, and read again when the file has changed.

        Raises:
            BadInput: there is no such file, or it is truncated or malformed.
        """
        try:
            stat = os.stat(path)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
        return _open(path, stat.st_size, stat.st_mtime_ns)

    def keys(self) -> list[str]:
        """Names of all tensors in the file."""
        return list(self._header)

    def describe(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of one tensor."""
        entry = self._entry(key)
        return tuple(entry["shape"]), _DTYPES[entry["dtype"]]

    def read(self, key: str) -> Tensor:
        """One tensor, freshly allocated."""
        shape, dtype = self.describe(key)
        begin, end = self._entry(key)["data_offsets"]
        raw = torch.empty(end - begin, dtype=torch.uint8)
        if read_into(self.path, self._data_start + begin, raw) < len(raw):
            raise BadInput(f"{self.path}: truncated inside tensor {key!r}")
        return raw.view(dtype).reshape(shape)

    def read_rows(self, key: str, start: int, stop: int, pages: Tensor) -> Tensor:
        """Rows `start` to `stop` of one tensor, of its leading axis.

        Args:
            pages: memory for them, from `disk.new_pages`; the result lies in it.
        """
        (rows, *rest), dtype = self.describe(key)
        begin, end = self._entry(key)["data_offsets"]
        row = (end - begin) // max(rows, 1)
        count = (stop - start) * row
        raw = read_bytes(self.path, self._data_start + begin + start * row, count, pages)
        if len(raw) < count:
            raise BadInput(f"{self.path}: truncated inside tensor {key!r}")
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(stop - start, *rest)

    def prefetch(self, key: str) -> None:
        """Ask the system to read a tensor into its cache meanwhile; a hint, it may do nothing."""
        if not hasattr(os, "posix_fadvise"):
            return
        begin, end = self._entry(key)["data_offsets"]
        with open(self.path, "rb", buffering=0) as handle:
            os.posix_fadvise(
                handle.fileno(), self._data_start + begin, end - begin, os.POSIX_FADV_WILLNEED
            )

    @functools.cached_property
    def identity(self) -> str:
        """A digest that stands for the content; see `file_identity`."""
        return file_identity(self.path, self._header)

    @functools.cached_property
    def content(self) -> str:
        """A digest that stands for the tensors alone: their names, places and 64 samples, not
        when or where the file was written and what it says of itself."""
        hasher = hashlib.sha256(json.dumps(self._header, sort_keys=True).encode())
        for sample in _samples(self.path, self._data_start):
            hasher.update(sample)
        return hasher.hexdigest()

    def _entry(self, key: str) -> dict[str, Any]:
        entry = self._header.get(key)
        if entry is None:
            raise BadInput(f"{self.path}: no tensor {key!r}{nearest(key, self._header)}")
        return entry


def file_identity(path: str, header: Mapping[str, Any]) -> str:
    """A digest that stands for a file: size, modification time, `header`, 64 samples.

    Reading 28 GB to name them would double the time of a run. Like a version-control index,
    this trusts size and time, and samples the data so that a restored or regenerated file
    with equal times is still told apart.
    """
    stat = os.stat(path)
    hasher = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    hasher.update(json.dumps(header, sort_keys=True).encode())
    for sample in _samples(path):
        hasher.update(sample)
    return hasher.hexdigest()


def _samples(path: str, start: int = 0) -> Iterator[bytes]:
    """Bytes from 64 places of a file, evenly from `start` to its end."""
    with open(path, "rb", buffering=0) as handle:
        span = max(os.fstat(handle.fileno()).st_size - start - _SAMPLE_BYTES, 0)
        for index in range(_SAMPLES):
            handle.seek(start + span * index // max(_SAMPLES - 1, 1))
            yield handle.read(_SAMPLE_BYTES)


@functools.lru_cache(maxsize=256)
def _open(path: str, size: int, mtime_ns: int) -> SafetensorsFile:
    return SafetensorsFile(path)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
            raise BadInput(f"{path}: not a whole safetensors file ({size} bytes)")
        try:
            header = json.loads(handle.read(length))
        except (ValueError, RecursionError):
            raise BadInput(f"{path}: the safetensors header is not JSON") from None
    if not isinstance(header, dict):
        raise BadInput(f"{path}: the safetensors header is not a JSON object")
    for key, entry in header.items():
        if key != _METADATA:
            _check_entry(path, key, entry, size - 8 - length)
    return header, 8 + length


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    """Take what a file says of itself out of its header."""
    found = header.pop(_METADATA, None)
    pairs = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def _check_entry(path: Path, key: str, entry: Any, data_bytes: int) -> None:
    try:
        dtype, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        whole = all(isinstance(side, int) and side >= 0 for side in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        raise BadInput(f"{path}: malformed header entry for tensor {key!r}") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise BadInput(f"{path}: tensor {key!r} has the unknown dtype {dtype!r}")
    if not whole or end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise BadInput(f"{path}: tensor {key!r} of shape {shape} does not fit its byte range")
    if end > data_bytes:
        raise BadInput(
            f"{path}: truncated, tensor {key!r} ends at byte {end} of {data_bytes} data bytes"
        )
