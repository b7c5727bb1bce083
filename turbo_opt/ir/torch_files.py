"""PyTorch files (`.pth`), read one tensor at a time and never trusted.

The index is unpickled by torch's restricted reader (`weights_only=True`), which builds tensors and
plain containers and nothing else; the data stays in the file, memory-mapped. Training dumps that
wrap the weights in `state_dict` or `model` are looked into.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from turbo_opt.errors import BadInput, nearest
from turbo_opt.ir.files import dtype_code, file_identity

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model")


class TorchFile:
    """The tensors of one file by name; the interface is that of `SafetensorsFile`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._tensors = _checked(path, _unwrapped(path, _load(path)))

    @classmethod
    def open(cls, path: str) -> TorchFile:
        """The file at `path`; mapped files are kept, and opened again when they have changed.

        Raises:
            BadInput: there is no such file, or it is no PyTorch file of tensors alone.
        """
        try:
            stat = os.stat(path)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
        return _open(path, stat.st_size, stat.st_mtime_ns)

    def keys(self) -> list[str]:
        """Names of all tensors in the file."""
        return list(self._tensors)

    def describe(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of one tensor."""
        tensor = self._tensor(key)
        return tuple(tensor.shape), tensor.dtype

    def read(self, key: str) -> Tensor:
        """One tensor, freshly allocated."""
        return self._tensor(key).clone(memory_format=torch.contiguous_format)

    def read_rows(self, key: str, start: int, stop: int, pages: Tensor) -> Tensor:
        """Rows `start` to `stop` of one tensor, of its leading axis, freshly allocated.

        Args:
            pages: not used; the map is the memory.
        """
        rows = self._tensor(key)[start:stop]
        return rows.clone(memory_format=torch.contiguous_format)

    def prefetch(self, key: str) -> None:
        """Nothing: the system reads ahead of a map by itself."""

    @functools.cached_property
    def identity(self) -> str:
        """A digest that stands for the content; see `file_identity`."""
        described = {
            key: [list(tensor.shape), dtype_code(tensor.dtype)]
            for key, tensor in self._tensors.items()
        }
        return file_identity(self.path, described)

    def _tensor(self, key: str) -> Tensor:
        tensor = self._tensors.get(key)
        if tensor is None:
            raise BadInput(f"{self.path}: no tensor {key!r}{nearest(key, self._tensors)}")
        return tensor


@functools.lru_cache(maxsize=16)
def _open(path: str, size: int, mtime_ns: int) -> TorchFile:
    return TorchFile(path)


def _load(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(
            f"{path}: holds more than tensors and plain containers, so it is not read; save the "
            "state dict alone, best as safetensors"
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            f"{path}: not a whole PyTorch file that can be mapped ({reason}); save it again with a "
            "current PyTorch, or as safetensors"
        ) from None


def _unwrapped(path: str, content: Any) -> Mapping[Any, Any]:
    """The mapping of names to tensors inside `content`."""
    if isinstance(content, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                return _unwrapped(path, content[wrapper])
        return content
    raise BadInput(f"{path}: holds a {type(content).__name__} instead of named tensors")


def _checked(path: str, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise BadInput(
                f"{path}: {key!r} is a {type(value).__name__}; a file of weights holds named "
                "tensors alone"
            )
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise BadInput(f"{path}: {key!r} is no plain dense tensor")
        try:
            dtype_code(value.dtype)
        except KeyError:
            raise BadInput(
                f"{path}: {key!r} has the dtype {value.dtype}, which is not read"
            ) from None
        tensors[key] = value.detach()
    return tensors
