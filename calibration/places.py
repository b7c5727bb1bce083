"""The folder of a job: what lies in it, who works in it, and whether a job may begin there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from turbo_opt.calibration.jobs.schema import Job
from turbo_opt.errors import BadInput
from turbo_opt.kernels.whole_file import write_whole

JOB, MODEL, SAMPLES, REPORT = "job.json", "model", "samples", "report.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
"""Locked while a process works in the folder; it stays, and so tells which folders are ours."""
Report = dict[str, Any]
"""What a job ends with, as JSON data."""
Progress = Callable[[str, int, int, str], None]
"""Told (what, done, in all, note)."""
Say = Callable[[str], None]
"""Told what was decided that the job does not say, a sentence each."""


def unheard(text: str) -> None:
    """Tell nobody."""


@contextlib.contextmanager
def job_folder(out: Path, job: Job, *, resume: bool, say: Say = unheard) -> Iterator[None]:
    """Make the folder of a new job or take up an old one's; no other process may meanwhile.

    A job that was stopped before its first checkpoint left nothing to go on from: the folder is
    taken for a new one.

    Raises:
        BadInput: something else is there, another process works there, a job that is not to be
            resumed, or none that could be. Nothing was changed.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise BadInput(f"{out}: exists and is no folder")
    held = (out / JOB).is_file()
    if resume and not held:
        raise BadInput(f"{out}: holds no job to go on with; leave --resume out to begin one there")
    if out.is_dir() and not held and any(item.name != LOCK for item in out.iterdir()):
        raise BadInput(f"{out}: exists and is no folder of a job; choose another --out")
    if held and not resume and not (out / LOCK).is_file():  # may be a file of the user's own
        raise _held_already(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "training", say):
        held, saved = (out / JOB).is_file(), _holds_checkpoint(out)  # others may have been faster
        if not resume and (saved or _results(out)):
            raise _held_already(out)
        if resume and not saved and (finished := _results(out)):
            raise BadInput(
                f"{out}: holds {' and '.join(finished)} and no checkpoint to go on from, as "
                "--closed-form leaves it; choose another --out"
            )
        if held and not saved:
            say(f"{out}: the job there has saved no checkpoint; this run begins at the first step")
        if not resume:
            write_job(out, job)
        yield


def write_job(out: Path, job: Job) -> None:
    """Write the job into its folder, in one step."""
    content = json.dumps(job.canonical(), indent=1) + "\n"
    write_whole(out / JOB, content)


def _held_already(out: Path) -> BadInput:
    return BadInput(f"{out}: holds a job already; --resume continues it, or choose another --out")


def _results(out: Path) -> list[str]:
    """What a job that ended has left."""
    return [name for name in (MODEL, REPORT) if (out / name).exists()]


def _holds_checkpoint(out: Path) -> bool:
    """Whether a whole one is there: those that are being written have names with a dot."""
    folder = out / CHECKPOINTS
    return folder.is_dir() and any(not item.name.startswith(".") for item in folder.iterdir())


@contextlib.contextmanager
def locked(out: Path, doing: str, say: Say = unheard) -> Iterator[None]:
    """Keep other processes out of a folder; the system lets go when this one ends, however it does.

    Raises:
        BadInput: one is `doing` something there.
    """
    with (out / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{out}: another process is {doing} there; wait for it, or choose another --out"
            ) from None
        except OSError as error:  # of file systems that know no locks
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            say(f"{out}: its file system cannot lock files; see that no other process works there")
        yield
