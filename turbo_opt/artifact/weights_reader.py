"""The stored weights of one denoiser, read one at a time and held to the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from turbo_opt.artifact.manifest import DenoiserRecord, inside
from turbo_opt.errors import BadInput
from turbo_opt.ir.files import SafetensorsFile
from turbo_opt.ir.weights import dtype_name


class StoredWeights(Mapping[str, Tensor]):
    """Name → tensor on `device`; every look-up reads the file, nothing is kept.

    Raises:
        BadInput: a shard does not hold what the manifest says; before any data is read.
    """

    def __init__(
        self, root: Path, record: DenoiserRecord, device: torch.device | str = "cpu"
    ) -> None:
        self._device = torch.device(device)
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
