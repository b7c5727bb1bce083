"""The stored weights of one denoiser, read a few at a time and held to the manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from turbo_opt.artifact.manifest import DenoiserRecord, inside
from turbo_opt.errors import BadInput
from turbo_opt.ir.files import SafetensorsFile
from turbo_opt.ir.weights import dtype_name

_READERS = 4
"""Weights read at once, and in host memory at once on their way to a GPU."""


class StoredWeights(Mapping[str, Tensor]):
    """Name → tensor on `device`; every look-up reads the file, nothing is kept.

    Raises:
        BadInput: a shard does not hold what the manifest says; before any data is read.
    """

    def __init__(
        self, root: Path, record: DenoiserRecord, device: torch.device | str = "cpu"
    ) -> None:
        self._device = _from_here(torch.device(device))
        self._files = {
            shard: SafetensorsFile.open(str(inside(root, shard))) for shard in record.shards
        }
        self._places = {name: self._files[entry.file] for name, entry in record.tensors.items()}
        for name, entry in record.tensors.items():
            file = self._places[name]
            shape, dtype = file.describe(name)
            if shape != entry.shape or dtype_name(dtype) != entry.dtype:
                raise BadInput(
                    f"{file.path}: weight {name!r} is {dtype_name(dtype)} {list(shape)}, "
                    f"the manifest says {entry.dtype} {list(entry.shape)}"
                )

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].read(name).to(self._device)

    @contextlib.contextmanager
    def arriving(self) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Inside, all weights are being read, several at once; what is given waits for them.

        On the way out, those that nobody waited for are left unread.

        Raises:
            BadInput: from the wait, a file ends inside a weight.
        """
        pool = ThreadPoolExecutor(_READERS)
        try:
            tensors = pool.map(self.__getitem__, self)
            yield lambda: dict(zip(self, tensors, strict=True))
        finally:
            pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _from_here(device: torch.device) -> torch.device:
    """The GPU that this thread means by `cuda`, and ready: another thread may mean another one."""
    if device.type != "cuda":
        return device
    torch.cuda.init()
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
