"""The samples that an index names: each a safetensors file, in the folder or in one of its tars."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from turbo_opt.calibration.data.formats import LARGEST_SAMPLE, parse_safetensors
from turbo_opt.calibration.data.tars import members
from turbo_opt.errors import BadInput


@dataclass
class ListedFiles:
    """Files of a folder by number.

    Attributes:
        folder: that they lie in.
        files: `000001.safetensors`, or `shard.tar/000001.safetensors`.
    """

    folder: Path
    files: Sequence[str]
    _shards: dict[str, dict[str, tuple[int, int]] | BadInput] = field(default_factory=dict)

    def check(self, number: int) -> None:
        """Look whether a sample is there and of a size that is read.

        Raises:
            BadInput, OSError: it is not.
        """
        self._place(self.files[number])

    def tensors(self, number: int) -> dict[str, Tensor]:
        """What a sample's file holds.

        Raises:
            BadInput, OSError: it cannot be read.
        """
        path, start, size = self._place(self.files[number])
        with path.open("rb") as handle:
            handle.seek(start)
            content = handle.read(size)
        if len(content) != size:
            raise BadInput("is cut off")
        return parse_safetensors(content)

    def _place(self, file: str) -> tuple[Path, int, int]:
        """(file on disk, first byte, number of bytes) of a sample."""
        parts = Path(file).parts
        if Path(file).is_absolute() or ".." in parts:
            raise BadInput("lies outside the folder")
        if "\0" in file:
            raise BadInput("has a name that no file has")
        for depth, part in enumerate(parts[:-1], start=1):
            if part.endswith(".tar"):
                shard, member = "/".join(parts[:depth]), "/".join(parts[depth:])
                return self.folder / shard, *self._member(shard, member)
        state = (self.folder / file).stat()
        if not stat.S_ISREG(state.st_mode):  # a pipe would be waited for
            raise BadInput("is no file")
        size = state.st_size
        if size > LARGEST_SAMPLE:
            raise BadInput(f"has {size} bytes, more than {LARGEST_SAMPLE}")
        return self.folder / file, 0, size

    def _member(self, shard: str, member: str) -> tuple[int, int]:
        if shard not in self._shards:
            self._shards[shard] = _members(self.folder / shard)
        found = self._shards[shard]
        if isinstance(found, BadInput):
            raise found
        if member not in found:
            raise BadInput(f"{shard} has no member {member!r}")
        return found[member]


def _members(path: Path) -> dict[str, tuple[int, int]] | BadInput:
    """Where a shard's members lie, or why it cannot be used: asked once for all its samples."""
    try:
        return {
            name: (start, size) for name, start, size in members(path) if size <= LARGEST_SAMPLE
        }
    except BadInput as error:
        return error
