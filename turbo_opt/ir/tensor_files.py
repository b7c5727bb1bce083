"""Files of named tensors, by the format that their name says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from turbo_opt.ir.files import SafetensorsFile
from turbo_opt.ir.torch_files import SUFFIXES, TorchFile


class TensorFile(Protocol):
    """What a lazy weight needs of a file.

    Attributes:
        metadata: what the file says of itself, text by name.
    """

    path: str
    metadata: Mapping[str, str]

    @property
    def identity(self) -> str:
        """A digest that stands for the content."""

    def keys(self) -> list[str]:
        """Names of all tensors in the file."""

    def describe(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of one tensor."""

    def read(self, key: str) -> Tensor:
        """One tensor, freshly allocated."""

    def read_rows(self, key: str, start: int, stop: int, pages: Tensor) -> Tensor:
        """Rows `start` to `stop` of one tensor."""

    def prefetch(self, key: str) -> None:
        """Ask the system to read a tensor into its cache meanwhile."""


def open_tensor_file(path: str) -> TensorFile:
    """The file at `path`: PyTorch's where its suffix says so, else safetensors.

    Raises:
        BadInput: there is no such file, or it is damaged or not of that format.
    """
    if path.endswith(SUFFIXES):
        return TorchFile.open(path)
    return SafetensorsFile.open(path)
