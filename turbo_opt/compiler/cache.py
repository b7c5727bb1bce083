"""The pass cache: programs by the content of everything that made them.

A key is a chain: the captured program's digest (graphs with arguments and dtypes, weight
expressions and file identities), then for each pass its text with options. The source of the
whole package and the versions of torch and friends go into the first link. Failures are never
stored; an entry appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import turbo_opt
from turbo_opt.compiler.storage import read_program, write_program
from turbo_opt.compiler.validation import PlannedPass
from turbo_opt.ir.program import Program

_KEPT_ENTRIES = 48
_VERSIONED = ("torch", "diffusers", "triton", "numpy")


class PassCache:
    """A folder of programs, one folder each, named by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Program | None:
        """The program stored under `key`; None when there is none that can be read."""
        entry = self.folder / key
        if not (entry / "program.json").is_file():
            return None
        try:
            program = read_program(entry)
        except Exception:
            shutil.rmtree(entry, ignore_errors=True)
            return None
        os.utime(entry)
        return program

    def put(self, key: str, program: Program) -> None:
        """Store `program`; the least recently used entries beyond 48 go.

        A cache that cannot be written (a full or read-only disk) stores nothing and says nothing:
        the run does not depend on it.
        """
        with contextlib.suppress(OSError):
            self._put(key, program)

    def _put(self, key: str, program: Program) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        try:
            write_program(program, staging)
            if (self.folder / key).exists():
                shutil.rmtree(staging)
            else:
                staging.rename(self.folder / key)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._prune()

    def _prune(self) -> None:
        entries = [entry for entry in self.folder.iterdir() if not entry.name.startswith(".")]
        entries.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry in entries[_KEPT_ENTRIES:]:
            shutil.rmtree(entry, ignore_errors=True)


def default_cache_folder() -> Path:
    """`$TURBO_OPT_CACHE`, else `turbo_opt` in the user's cache folder (XDG)."""
    explicit = os.environ.get("TURBO_OPT_CACHE")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "turbo_opt" / "passes"


def first_key(description: Any) -> str:
    """The key of what a pipeline starts from: a JSON description, our source, the versions."""
    return _digest([description, source_digest(), _versions()])


def next_key(key: str, planned: PlannedPass, verification: Any) -> str:
    """The key after one more pass.

    Args:
        verification: mode, seed and budget of its checks, since a stored result stands for a
            passed verification.
    """
    source = inspect.getsourcefile(planned.pass_class)
    own = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
    files = list(planned.pass_class.files_read(planned.options, planned.checkpoints))
    return _digest([key, str(planned.spec), str(planned.target), own, verification, files])


@functools.cache
def source_digest() -> str:
    """SHA-256 over all Python source of the package: compiler, passes and kernels."""
    root = Path(turbo_opt.__file__).parent
    hasher = hashlib.sha256()
    for folder, _, files in sorted(os.walk(root, followlinks=True)):
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder) / name
                hasher.update(str(path.relative_to(root)).encode())
                hasher.update(path.read_bytes())
    return hasher.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
