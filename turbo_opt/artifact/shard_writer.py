"""A shard onto disk: bands of rows are read and computed side by side, and written in order.

Every thread takes one band at a time, reads it and computes its outputs; the calling thread takes
the results in the order of the file, hashes them and hands them to the disk. So reading, computing,
hashing and writing overlap, memory is a few bands, and the threads share no loop inside torch,
whose own threads lose far more time waiting for one another than they save.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from turbo_opt.artifact.shards import Shard, tensor_bytes
from turbo_opt.errors import TurboOptError
from turbo_opt.ir.disk import SequentialFile
from turbo_opt.ir.weights import Band

_BAND_BYTES = 16 * 2**20
_MOST_WORKERS = 8
_WAITING = 3
"""Threads beyond those that torch uses: so many wait for the disk on average."""


def write_shard(shard: Shard, path: Path, tick: Callable[[int], None]) -> str:
    """Compute and write every tensor of a shard; the SHA-256 of the file, which is not yet synced.

    Three more threads work than torch uses, 8 at most. An expression that cannot be cut in bands is
    held whole, one of them at a time. The first failure, of a thread or of `tick`, stops all
    threads and is raised when they have ended.

    Args:
        tick: told the bytes of each tensor, or of all outputs of one expression.

    Raises:
        TurboOptError: a computed tensor is not of the shape or dtype it was declared with.
        OSError: the disk is full or fails.
    """
    jobs = [(names, shard.weights[names[0]].bands(_BAND_BYTES)) for names in _runs(shard)]
    with (
        ThreadPoolExecutor(1) as disk,
        SequentialFile(path, disk) as file,
        _Workers() as workers,
    ):
        file.write(memoryview(shard.header))
        results = workers.in_order(band for _, bands in jobs for band in bands)
        for names, bands in jobs:
            writer = _Job(shard, names, file)
            for _ in bands:
                writer.add(next(results))
            tick(writer.finish())
        return file.close()


def _runs(shard: Shard) -> Iterator[list[str]]:
    """Names that follow each other in the file and come out of one expression."""
    for _, run in groupby(shard.weights, key=lambda name: shard.weights[name].producer):
        yield list(run)


class _Job:
    """The outputs of one expression that lie side by side in the file.

    The first is written band by band, the others are kept until it is whole.
    """

    def __init__(self, shard: Shard, names: Sequence[str], file: SequentialFile) -> None:
        self._weights = shard.weights
        self._kept: dict[str, list[Tensor]] = {name: [] for name in names[1:]}
        self._written = dict.fromkeys(names, 0)
        self._file = file

    def add(self, outputs: Sequence[Tensor]) -> None:
        """The next band of rows of every output."""
        for name in self._written:
            tensor = outputs[self._weights[name].output]
            if name in self._kept:
                self._kept[name].append(tensor)
            else:
                self._write(name, tensor)

    def finish(self) -> int:
        """Write what was kept; bytes of all outputs."""
        for name, tensors in self._kept.items():
            for tensor in tensors:
                self._write(name, tensor)
        for name, count in self._written.items():
            if count != self._weights[name].nbytes:
                raise TurboOptError(
                    f"weight {name!r} came out as {count} bytes, "
                    f"declared as {self._weights[name].nbytes}"
                )
        return sum(self._written.values())

    def _write(self, name: str, tensor: Tensor) -> None:
        declared, data = self._weights[name], tensor_bytes(tensor)
        self._written[name] += len(data)
        fits = self._written[name] <= declared.nbytes and tensor.shape[1:] == declared.shape[1:]
        if not fits or tensor.dtype != declared.dtype or tensor.ndim != len(declared.shape):
            raise TurboOptError(
                f"weight {name!r} came out as {tensor.dtype} {list(tensor.shape)}, "
                f"declared as {declared.dtype} {list(declared.shape)}"
            )
        self._file.write(data)


class _Workers:
    """Threads that compute bands, each with torch operators that run in that thread alone."""

    def __enter__(self) -> _Workers:
        self._torch_threads = torch.get_num_threads()
        self._count = min(self._torch_threads + _WAITING, _MOST_WORKERS)
        self._memory = threading.local()
        self._pool = ThreadPoolExecutor(self._count, initializer=self._prepare)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        # The setting of this thread never changed; that of threads yet to be started did.
        torch.set_num_threads(self._torch_threads)

    def in_order(self, bands: Iterable[Band]) -> Iterator[Sequence[Tensor]]:
        """The outputs of each band; the next ones are computed meanwhile."""
        pending: deque[tuple[Band, Future[Sequence[Tensor]] | None]] = deque()
        for band in bands:
            if len(pending) > self._count:
                yield self._result(*pending.popleft())
            # What is held whole waits for its turn, so that only one is held.
            whole = band.rows is None
            pending.append((band, None if whole else self._pool.submit(self._compute, band)))
        while pending:
            yield self._result(*pending.popleft())

    def _prepare(self) -> None:
        torch.set_num_threads(1)
        self._memory.pages = {}

    def _compute(self, band: Band) -> Sequence[Tensor]:
        memory: dict[int, Tensor] = self._memory.pages
        outputs = band.load(memory)
        read = {pages.untyped_storage().data_ptr() for pages in memory.values()}
        return [
            tensor.clone() if tensor.untyped_storage().data_ptr() in read else tensor
            for tensor in outputs
        ]

    @staticmethod
    def _result(band: Band, future: Future[Sequence[Tensor]] | None) -> Sequence[Tensor]:
        return band.load({}) if future is None else future.result()
