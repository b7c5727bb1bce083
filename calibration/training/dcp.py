"""Folders of PyTorch Distributed Checkpoint (DCP), read without trusting them.

A DCP folder's `.metadata` is a pickle, which may run code when it is read. Only the classes that
describe tensors are let through. Entries that are not tensors are pickles again: a checkpoint of
ours has none, and those of other programs are left where they are.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from turbo_opt.errors import BadInput

METADATA = ".metadata"
_ALLOWED = {
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


class Damaged(BadInput):
    """A folder whose data files are not what its metadata says."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


class TensorReader(FileSystemReader):
    """DCP's reader of folders, with metadata that can only describe tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See FileSystemReader."""
        metadata, _ = read_tensor_metadata(Path(self.path))
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(folder: Path) -> Metadata:
    """What a DCP folder of tensors alone holds.

    Raises:
        BadInput: it is no finished DCP folder, or holds more than tensors.
    """
    metadata, others = read_tensor_metadata(folder)
    if others:
        raise BadInput(
            f"{folder}: holds pickled objects ({', '.join(others[:3])}); only tensors are read"
        )
    return metadata


def read_tensor_metadata(folder: Path) -> tuple[Metadata, list[str]]:
    """What tensors a DCP folder holds, and the names of what else is in it, which nobody can read.

    Raises:
        BadInput: it is no finished DCP folder.
    """
    file = folder / METADATA
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such checkpoint folder")
    if not file.is_file():
        raise BadInput(
            f"{folder}: has no {METADATA}, so it is no DCP checkpoint, or one whose saving was "
            "stopped; use an earlier one"
        )
    try:
        with file.open("rb") as handle:
            metadata = _MetadataUnpickler(handle).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"a {type(metadata).__name__}")
        outside = [
            info.relative_path
            for info in (metadata.storage_data or {}).values()
            if Path(info.relative_path).name != info.relative_path
        ]
        entries = metadata.state_dict_metadata
        if not all(isinstance(name, str) for name in entries):
            raise pickle.UnpicklingError("names that are no text")
        others = sorted(
            name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)
        )
        for name in others:
            del entries[name]
    except Exception as error:  # damage shows as almost any
        raise BadInput(f"{file}: not the metadata of a DCP checkpoint ({error})") from None
    if outside:
        raise BadInput(f"{file}: points outside its folder ({outside[0]})")
    return metadata, others


def check_holds(folder: Path, wanted: Mapping[str, Tensor]) -> None:
    """Every wanted tensor is in the folder, in its shape.

    Raises:
        BadInput: one is not; the folder is of another training.
    """
    stored: dict[str, Any] = read_tensor_metadata(folder)[0].state_dict_metadata
    missing = sorted(name for name in wanted if name not in stored)
    if missing:
        raise BadInput(
            f"{folder}: lacks {len(missing)} of {len(wanted)} tensors ({', '.join(missing[:3])}); "
            "it is a checkpoint of another model or job"
        )
    for name, tensor in wanted.items():
        if tuple(stored[name].size) != tuple(tensor.shape):
            raise BadInput(
                f"{folder}: {name} has shape {list(stored[name].size)}, this model "
                f"needs {list(tensor.shape)}"
            )


def read_tensors(folder: Path, into: Mapping[str, Tensor], alone: bool = True) -> None:
    """Fill the given tensors, whole or this process's parts of them.

    Args:
        alone: this process reads by itself; else all processes must call.

    Raises:
        BadInput: as `check_holds`.
        Damaged: the data files are.
    """
    check_holds(folder, into)
    try:
        dcp.load(dict(into), storage_reader=TensorReader(folder), no_dist=alone)
    except (Exception, dcp.CheckpointException) as error:
        raise Damaged(f"{folder}: cannot be read, it is damaged ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """Why DCP could not read or write, in one line; its own text is every process's stack."""
    if isinstance(error, dcp.CheckpointException):
        error = next((first for first, _ in error.failures.values()), error)
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__
