"""Safetensors files, read one tensor at a time and never trusted.

The header is checked against the file before a byte of data is used: offsets in range and in
order, sizes that follow from shape and dtype. Tensors are read with positioned reads rather than
a memory map, so that the resident set of the process stays at one tensor.
Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON
header, data).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbo_opt.errors import BadInput, nearest

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
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 2**10
_PAGE = 4096
_DIRECT_BYTES = 2**20
"""Longer reads of rows go past the system's cache where it does not hold the data: filling it
costs more processor time than quantizing, and a model larger than memory is never found there."""


def dtype_code(dtype: torch.dtype) -> str:
    """The format's name of a dtype: `torch.bfloat16` → `"BF16"`."""
    return _CODES[dtype]


class SafetensorsFile:
    """The header of one file, and reads of its tensors by key."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._header, self._data_start = _read_header(Path(path))

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
        array: Any = raw.numpy()
        if _fill(self.path, 0, memoryview(array), 0, self._data_start + begin, 0) < len(raw):
            raise BadInput(f"{self.path}: truncated inside tensor {key!r}")
        return raw.view(dtype).reshape(shape)

    def read_rows(self, key: str, start: int, stop: int, pages: Tensor) -> Tensor:
        """Rows `start` to `stop` of one tensor, of its leading axis.

        Args:
            pages: memory for them, from `new_pages`; the result lies in it.
        """
        (rows, *rest), dtype = self.describe(key)
        begin, end = self._entry(key)["data_offsets"]
        row = (end - begin) // max(rows, 1)
        count = (stop - start) * row
        raw = _read_bytes(self.path, self._data_start + begin + start * row, count, pages)
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
        """A digest that stands for the content: size, modification time, header, 64 samples.

        Reading 28 GB to name them would double the time of a run. Like a version-control index,
        this trusts size and time, and samples the data so that a restored or regenerated file
        with equal times is still told apart.
        """
        stat = os.stat(self.path)
        hasher = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        hasher.update(json.dumps(self._header, sort_keys=True).encode())
        with open(self.path, "rb", buffering=0) as handle:
            span = max(stat.st_size - _SAMPLE_BYTES, 0)
            for index in range(_SAMPLES):
                handle.seek(span * index // max(_SAMPLES - 1, 1))
                hasher.update(handle.read(_SAMPLE_BYTES))
        return hasher.hexdigest()

    def _entry(self, key: str) -> dict[str, Any]:
        entry = self._header.get(key)
        if entry is None:
            raise BadInput(f"{self.path}: no tensor {key!r}{nearest(key, self._header)}")
        return entry


def new_pages(count: int) -> Tensor:
    """Memory for reads of up to `count` bytes, uint8, beginning at a page."""
    buffer = torch.empty(count + 3 * _PAGE, dtype=torch.uint8)
    return buffer[-buffer.data_ptr() % _PAGE :]


def _read_bytes(path: str, position: int, count: int, pages: Tensor) -> Tensor:
    """`count` bytes of a file, read into `pages`; fewer where the file ends."""
    lead = position % _PAGE
    array: Any = pages.numpy()
    view, filled = memoryview(array)[: -(-(lead + count) // _PAGE) * _PAGE], 0
    if count >= _DIRECT_BYTES and hasattr(os, "O_DIRECT") and hasattr(os, "RWF_NOWAIT"):
        for mode, flags in ((0, os.RWF_NOWAIT), (os.O_DIRECT, 0)):
            # What cannot be had this way is left to the plain read below.
            with contextlib.suppress(OSError):
                filled = _fill(path, mode, view, filled // _PAGE * _PAGE, position - lead, flags)
    if filled < lead + count:
        filled = _fill(path, 0, view[: lead + count], filled, position - lead, 0)
    return pages[lead : max(min(filled, lead + count), lead)]


def _fill(path: str, mode: int, view: memoryview, filled: int, position: int, flags: int) -> int:
    """Read on from `filled` bytes of `view`, which stands at `position` of a file; how far it got.

    Raises:
        OSError: nothing more could be read so.
    """
    handle = os.open(path, os.O_RDONLY | mode)
    try:
        while filled < len(view):
            try:
                count = os.preadv(handle, [view[filled:]], position + filled, flags)
            except OSError:
                if mode or flags:
                    break
                raise
            if not count:
                break
            filled += count
        return filled
    finally:
        os.close(handle)


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
    header.pop("__metadata__", None)
    for key, entry in header.items():
        _check_entry(path, key, entry, size - 8 - length)
    return header, 8 + length


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
