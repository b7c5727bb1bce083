"""Where a command will write: checked before any work, so that bad input leaves nothing behind."""

from __future__ import annotations

import os
import re
from pathlib import Path

from turbo_opt.errors import BadInput

_DUMP_FILE = re.compile(r"\d{3}-.*\.(txt|ops\.json)")
_REPRODUCER_FILES = {"pipeline.txt", "error.txt", "program", "recipe.json"}


def plain_place(path: Path) -> Path:
    """`path` with `~` expanded, and with a name of its own: not `.` or `..`."""
    path = path.expanduser()
    return path if path.name not in ("", "..") else path.resolve()


def check_artifact_place(out: Path, *, overwrite: bool) -> None:
    """`out` may become an artifact, and a reproducer may be written beside it.

    Raises:
        BadInput: something that is not ours is there, or the folder above cannot be written.
    """
    from turbo_opt.artifact.manifest import is_artifact
    from turbo_opt.artifact.staging import check_destination

    if not overwrite and out.is_dir() and is_artifact(out):
        raise BadInput(f"{out}: an artifact is there already; --overwrite replaces it")
    check_destination(out, overwrite=overwrite)
    check_writable(out)
    place = reproducer_of(out)
    if os.path.lexists(place) and not _holds_only(place, _REPRODUCER_FILES.__contains__):
        raise BadInput(f"{place}: in the way of a reproducer and none of ours; move it")


def reproducer_of(out: Path) -> Path:
    """Where a failing pass of a run to `out` leaves its reproducer."""
    return out.with_name(f"{out.name}.reproducer")


def check_dump_place(folder: Path) -> None:
    """`folder` may take an IR dump: it is free, empty, or holds an older dump.

    Raises:
        BadInput: it holds anything else.
    """
    if os.path.lexists(folder) and not _holds_only(folder, _is_dump):
        raise BadInput(f"{folder}: exists and is no IR dump; choose another folder")
    check_writable(folder)


def clear_dump(folder: Path) -> None:
    """Remove the files of an older IR dump."""
    for item in folder.iterdir() if folder.is_dir() else ():
        if _is_dump(item.name):
            item.unlink()


def check_writable(path: Path) -> None:
    """`path` can be made: the nearest folder above it that exists is writable.

    Raises:
        BadInput: it is not.
    """
    above = existing_parent(path)
    if not above.is_dir():
        raise BadInput(f"{path}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(f"{path}: {above} may not be written")


def existing_parent(path: Path) -> Path:
    """The nearest existing path above `path`."""
    above = path.absolute().parent
    while not above.exists():
        above = above.parent
    return above


def _is_dump(name: str) -> bool:
    return _DUMP_FILE.fullmatch(name) is not None


def _holds_only(folder: Path, ours: object) -> bool:
    return folder.is_dir() and all(ours(item.name) for item in folder.iterdir())  # type: ignore[operator]
