"""A directory that appears whole or not at all, and can be continued after a kill.

Beside `out` lie, while it is written, `.out.partial/` (the files) and `.out.partial.journal`:
locked by the one process that writes, one line for every finished shard. The directory becomes
`out` by a rename; the journal goes last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from turbo_opt.artifact.manifest import is_artifact
from turbo_opt.artifact.shards import Shard, sha256_of
from turbo_opt.errors import BadInput

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_destination(out: Path, *, overwrite: bool) -> None:
    """`out` may be written: it is free, an empty directory, or an artifact to be replaced.

    Raises:
        BadInput: it is anything else; nothing was touched.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise BadInput(f"{out}: exists and is not a directory")
    if not any(out.iterdir()):
        return
    if not is_artifact(out):
        raise BadInput(f"{out}: exists and is not a turbo_opt artifact; choose another folder")
    if not overwrite:
        raise BadInput(f"{out}: an artifact is there already; pass overwrite to replace it")


def check_space(folder: Path, needed: int) -> None:
    """There is room for `needed` bytes in `folder`.

    Raises:
        BadInput: there is not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(_too_little(folder, needed, free))


@contextlib.contextmanager
def disk_full_is_bad_input(folder: Path, needed: int) -> Iterator[None]:
    """Turn "no space left" inside the block into a message that says how much is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BadInput(_too_little(folder, needed, shutil.disk_usage(folder).free)) from error


@dataclass
class Staging:
    """The directory under its temporary name.

    Attributes:
        path: where to write.
        out: what it becomes.
        finished: shard key → (file, sha256) of earlier, killed runs.
    """

    path: Path
    out: Path
    journal: IO[str]
    finished: dict[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, *, resume: bool) -> Iterator[Staging]:
        """Make or continue the staging directory of `out`; removed on failure unless `resume`.

        Raises:
            BadInput: another process is saving to `out`, or the name is taken by a stranger.
        """
        out.parent.mkdir(parents=True, exist_ok=True)
        path = out.with_name(f".{out.name}.partial")
        journal_path = out.with_name(f".{out.name}.partial.journal")
        if os.path.lexists(path) and not journal_path.is_file():
            raise BadInput(f"{path}: in the way and not left by a save of ours; move it")
        with open(journal_path, "a+", encoding="utf-8") as journal:
            _lock(journal, out)
            staging = cls(path, out, journal)
            if resume:
                staging.finished = _read_journal(journal)
            else:
                staging._clear()
            try:
                path.mkdir(exist_ok=True)
                yield staging
            except BaseException:
                if not resume:
                    staging._clear()
                    journal_path.unlink(missing_ok=True)
                raise
            journal_path.unlink(missing_ok=True)

    def reusable(self, shard: Shard) -> str | None:
        """SHA-256 of the shard's file if an earlier run finished it and it is still intact."""
        file, digest = self.finished.get(shard.key, ("", ""))
        path = self.path / shard.file
        if file != shard.file or not path.is_file() or path.stat().st_size != shard.nbytes:
            return None
        return digest if sha256_of(path) == digest else None

    def keep_only(self, files: set[str]) -> None:
        """Remove everything an earlier run left but `files` (paths inside the directory)."""
        for item in self.path.rglob("*"):
            if not item.is_dir() and item.relative_to(self.path).as_posix() not in files:
                item.unlink()

    def record(self, shard: Shard, digest: str) -> None:
        """Note a shard whose file is on disk."""
        self.journal.write(json.dumps({"key": shard.key, "file": shard.file, "sha256": digest}))
        self.journal.write("\n")
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def publish(self) -> None:
        """Make the directory `out`, in one step; an artifact that is there is replaced."""
        for folder in [self.path, *(item for item in self.path.rglob("*") if item.is_dir())]:
            sync(folder)
        if self.out.is_dir() and any(self.out.iterdir()):
            _replace(self.path, self.out)
        else:
            os.rename(self.path, self.out)
        sync(self.out.parent)

    def _clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.journal.truncate(0)


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(journal: IO[str], out: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{out}: another process is saving to it") from None


def _read_journal(journal: IO[str]) -> dict[str, tuple[str, str]]:
    journal.seek(0)
    finished = {}
    for line in journal:
        # A kill may have cut the last line.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            finished[str(entry["key"])] = (str(entry["file"]), str(entry["sha256"]))
    return finished


def _replace(new: Path, old: Path) -> None:
    """Swap two directories atomically where the system can, and remove the old one."""
    if not _exchange(new, old):
        aside = old.with_name(f".{old.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except BaseException:
            os.rename(aside, old)
            raise
        new = aside
    shutil.rmtree(new, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _too_little(folder: Path, needed: int, free: int) -> str:
    return (
        f"the artifact needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free "
        f"on {folder}; free some space or choose another folder"
    )
