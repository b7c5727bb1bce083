"""Shards onto disk: expressions side by side, each from file to file in bands of rows.

Every thread takes one expression at a time and does all of it: read a band, compute, write. There
are no queues of tensors between threads, so memory is a few bands for each of them; and they
share no loop inside torch, whose threads lose far more time waiting for one another than they save
when a core has other work.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor

from turbo_opt.artifact.shards import Shard, tensor_bytes, write_at
from turbo_opt.errors import TurboOptError

_BAND_BYTES = 16 * 2**20
_MOST_WORKERS = 8
_WAITING = 2
"""Threads beyond those that torch uses: so many wait for the disk on average."""


def write_shard(shard: Shard, path: Path, tick: Callable[[int], None]) -> None:
    """Compute and write every tensor of a shard; `tick` is told the bytes of each expression.

    Two more threads work than torch uses, 8 at most. An expression that cannot be cut in bands is
    held whole, one of them at a time. The first failure, of a thread or of `tick`, stops all
    threads and is raised when they have ended.

    Raises:
        TurboOptError: a computed tensor is not of the shape or dtype it was declared with.
        OSError: the disk is full or fails.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_at(handle, memoryview(shard.header), 0)
        os.ftruncate(handle, shard.nbytes)
        with _workers() as pool:
            writer = _Writer(shard, handle)
            pending = [pool.submit(writer.write, names) for names in writer.expressions]
            try:
                for done in as_completed(pending):
                    tick(done.result())
            except BaseException:
                writer.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        os.close(handle)


class _Writer:
    """Writes expressions of one shard to their places in an open file, from any thread.

    Attributes:
        expressions: the names of the outputs of each, in the order they should be written.
        stopped: once set, whatever runs ends with its band.
    """

    def __init__(self, shard: Shard, handle: int) -> None:
        self.expressions = shard.weights.names_by_producer()
        self.stopped = threading.Event()
        self._shard = shard
        self._handle = handle
        self._whole = threading.Lock()

    def write(self, names: Sequence[str]) -> int:
        """Compute and write the tensors of one expression; their bytes."""
        expression = self._shard.weights[names[0]]
        with contextlib.nullcontext() if expression.comes_in_bands else self._whole:
            written = dict.fromkeys(names, 0)
            for outputs in expression.bands(_BAND_BYTES):
                for name in names:
                    if self.stopped.is_set():
                        return 0
                    tensor = outputs[self._shard.weights[name].output]
                    written[name] += self._write_band(name, tensor, written[name])
        for name in names:
            if written[name] != self._shard.weights[name].nbytes:
                raise TurboOptError(
                    f"weight {name!r} came out as {written[name]} bytes, "
                    f"declared as {self._shard.weights[name].nbytes}"
                )
        return sum(written.values())

    def _write_band(self, name: str, tensor: Tensor, begin: int) -> int:
        """Write the rows of a tensor that lie `begin` bytes from its start; their bytes."""
        place, whole = self._shard.places[name], self._shard.weights[name].nbytes
        data = tensor_bytes(tensor)
        fits = begin + len(data) <= whole and tensor.shape[1:] == place.shape[1:]
        if not fits or tensor.dtype != place.dtype or tensor.ndim != len(place.shape):
            raise TurboOptError(
                f"weight {name!r} came out as {tensor.dtype} {list(tensor.shape)}, "
                f"declared as {place.dtype} {list(place.shape)}"
            )
        write_at(self._handle, data, place.begin + begin)
        return len(data)


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads whose torch operators run in that thread alone; ended when the block is left."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            min(threads + _WAITING, _MOST_WORKERS), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        # The setting of this thread never changed; that of threads yet to be started did.
        torch.set_num_threads(threads)
