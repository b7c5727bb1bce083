"""Uncompressed tar files: where their members lie, and new ones that appear whole."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from turbo_opt.artifact.staging import sync
from turbo_opt.errors import BadInput

_END = bytes(tarfile.BLOCKSIZE)


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, number of bytes) of each plain file in a tar; links are passed over.

    Only headers are read. Names are what the tar says: none is a path to be opened.

    Raises:
        BadInput: it is no uncompressed tar, or it is cut off.
        OSError: it cannot be read.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            for item in archive:
                if item.size < 0:
                    raise tarfile.TarError(f"{item.name!r} has {item.size} bytes")
                if item.isreg() and not item.sparse:
                    yield item.name, item.offset_data, item.size
            end = archive.offset
    # A damaged header may also say sizes that are no numbers, or that no file has.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise BadInput(f"{path} is not an uncompressed tar, or cut off ({error})") from None
    # tarfile takes a cut or damaged header for the end.
    with path.open("rb") as file:
        file.seek(end)
        if file.read(len(_END)) != _END:
            raise BadInput(f"{path} is cut off or damaged at byte {end}")


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, content) of files into a tar, which takes its place when it is on disk."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, content in files:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)
