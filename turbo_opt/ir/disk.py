"""Reads and writes that pass the system's cache by, where the file system can.

Weights are read once and written once. Through the cache each gigabyte costs about a second of
processor time to write and half of one to read, more than quantizing and hashing it does; past it,
the disk moves the bytes and the processor is free. What cannot be had this way (a file system
without it, data that is in memory already) goes through the cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Executor, Future
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PAGE = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)
_LEAST_BYTES = 2**20
"""Shorter reads go through the cache: they cost little there, and their neighbours profit."""
_BUFFER_BYTES = 8 * 2**20
_BUFFERS = 3
"""One is filled while one is written and one waits."""


def new_pages(count: int) -> Tensor:
    """Memory for reads of up to `count` bytes, uint8, beginning at a page."""
    size = pages_for(count)
    buffer = torch.empty(size + _PAGE, dtype=torch.uint8)
    return buffer[-buffer.data_ptr() % _PAGE :][:size]


def pages_for(count: int) -> int:
    """Bytes of the pages that any `count` bytes of a file may lie on."""
    return -(-count // _PAGE) * _PAGE + _PAGE


def read_bytes(path: str, position: int, count: int, pages: Tensor) -> Tensor:
    """`count` bytes of a file, read into `pages`; fewer where the file ends.

    Args:
        pages: from `new_pages(count)`; the result lies in it.

    Raises:
        OSError: the file cannot be read.
    """
    lead = position % _PAGE
    view, filled = _memory(pages)[: -(-(lead + count) // _PAGE) * _PAGE], 0
    if _DIRECT and count >= _LEAST_BYTES and not _is_cached(path, position - lead, len(view)):
        # What cannot be had this way is left to the plain read below.
        with contextlib.suppress(OSError):
            filled = _fill(path, _DIRECT, view, 0, position - lead) // _PAGE * _PAGE
    if filled < lead + count:
        filled = _fill(path, 0, view[: lead + count], filled, position - lead)
    return pages[lead : max(min(filled, lead + count), lead)]


def read_into(path: str, position: int, memory: Tensor) -> int:
    """Fill a uint8 tensor from a place in a file, through the cache; bytes read."""
    return _fill(path, 0, _memory(memory), 0, position)


class SequentialFile:
    """A new file, written from its beginning to its end, and hashed on the way.

    Bytes are gathered in a few buffers, which `disk` writes meanwhile.

    Args:
        disk: runs the writes; one thread of it is enough.

    Raises:
        OSError: the file cannot be made; from `write` and `close`, the disk is full or fails.
    """

    def __init__(self, path: Path, disk: Executor) -> None:
        self._hasher = hashlib.sha256()
        self._disk = disk
        self._written: deque[tuple[Tensor, Future[None]]] = deque()
        self._buffer = new_pages(_BUFFER_BYTES)
        self._filled = self._begin = 0
        self._cached = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._direct = self._cached
        if _DIRECT:
            with contextlib.suppress(OSError):
                self._direct = os.open(path, os.O_WRONLY | _DIRECT)

    def __enter__(self) -> SequentialFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, future in self._written:
            future.cancel()
        for _, future in self._written:
            with contextlib.suppress(BaseException):
                future.result()
        for handle in {self._cached, self._direct}:
            os.close(handle)

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._begin + self._filled

    def write(self, data: memoryview) -> None:
        """Append `data`, which is free for other use when this returns."""
        self._hasher.update(data)
        source = np.frombuffer(data, dtype=np.uint8)
        while len(source):
            count = min(len(source), _BUFFER_BYTES - self._filled)
            self._buffer.numpy()[self._filled : self._filled + count] = source[:count]
            self._filled += count
            source = source[count:]
            if self._filled == _BUFFER_BYTES:
                self._hand_over(_BUFFER_BYTES)

    def close(self) -> str:
        """Wait until everything is written; the SHA-256 of the file. It may not be synced yet."""
        size = self.position
        if self._filled:
            # Whole pages; what is too much is cut off again.
            self._buffer[self._filled :].zero_()
            self._hand_over(-(-self._filled // _PAGE) * _PAGE)
        while self._written:
            self._written.popleft()[1].result()
        os.ftruncate(self._cached, size)
        return self._hasher.hexdigest()

    def _hand_over(self, count: int) -> None:
        view = _memory(self._buffer)[:count]
        self._written.append((self._buffer, self._disk.submit(self._put, view, self._begin)))
        self._begin += self._filled
        self._filled = 0
        if len(self._written) < _BUFFERS:
            self._buffer = new_pages(_BUFFER_BYTES)
            return
        self._buffer, oldest = self._written.popleft()
        oldest.result()

    def _put(self, view: memoryview, position: int) -> None:
        try:
            _write_at(self._direct, view, position)
        except OSError as error:
            # So says a file system that writes through its cache only, or in larger units.
            if error.errno != errno.EINVAL:
                raise
            _write_at(self._cached, view, position)


def _write_at(handle: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], position + done)


def _memory(tensor: Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array)


def _fill(path: str, mode: int, view: memoryview, filled: int, position: int) -> int:
    """Read on from `filled` bytes of `view`, which stands at `position` of a file; how far it got.

    Raises:
        OSError: nothing more could be read so.
    """
    handle = os.open(path, os.O_RDONLY | mode)
    try:
        while filled < len(view):
            try:
                count = os.preadv(handle, [view[filled:]], position + filled)
            except OSError:
                if mode:
                    break
                raise
            if not count:
                break
            filled += count
        return filled
    finally:
        os.close(handle)


def _is_cached(path: str, position: int, count: int) -> bool:
    """Whether the system holds a stretch of a file in memory, so that a plain read is a copy.

    `position` stands at a page. Asking by a read that must not wait would start one.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError), open(path, "rb") as handle:
        count = min(count, os.fstat(handle.fileno()).st_size - position)
        with mmap.mmap(handle.fileno(), count, offset=position, access=mmap.ACCESS_COPY) as mapped:
            pages = (ctypes.c_ubyte * -(-count // _PAGE))()
            address = ctypes.c_char.from_buffer(mapped)
            try:
                failed = ctypes.CDLL(None).mincore(
                    ctypes.byref(address), ctypes.c_size_t(count), pages
                )
            finally:
                del address  # a map that is looked at cannot be closed
            return not failed and all(page & 1 for page in pages)
    return False
