"""What the disk itself takes for given reads and writes: direct, several at a time."""

from __future__ import annotations

import mmap
import os
import queue
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 16 * 2**20
_READERS = 4


def disk_seconds(sources: Sequence[Path], written: int, probe: Path) -> float:
    """Read every byte of `sources` and meanwhile write `written` bytes to `probe`, synced.

    Nothing passes through the system's cache. `probe` is removed again.

    Args:
        written: rounded up to whole pages.

    Raises:
        OSError: the file system has no direct input and output, or the disk is too small.
    """
    blocks: queue.SimpleQueue[tuple[Path, int]] = queue.SimpleQueue()
    for path in sources:
        for position in range(0, path.stat().st_size, _BLOCK):
            blocks.put((path, position))
    started = time.perf_counter()
    with ThreadPoolExecutor(_READERS + 1) as pool:
        tasks = [pool.submit(_read, blocks) for _ in range(_READERS)]
        tasks.append(pool.submit(_write, probe, written))
        for task in tasks:
            task.result()
    seconds = time.perf_counter() - started
    probe.unlink()
    return seconds


def _read(blocks: queue.SimpleQueue[tuple[Path, int]]) -> None:
    with mmap.mmap(-1, _BLOCK) as memory:
        while True:
            try:
                path, position = blocks.get_nowait()
            except queue.Empty:
                return
            handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(handle, [memory], position)
            finally:
                os.close(handle)


def _write(path: Path, count: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
    with mmap.mmap(-1, _BLOCK) as memory:
        memory[:] = os.urandom(_BLOCK)
        try:
            pages = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
            for position in range(0, pages, _BLOCK):
                with memoryview(memory)[: pages - position] as part:
                    os.pwrite(handle, part, position)
            os.fsync(handle)
        finally:
            os.close(handle)
