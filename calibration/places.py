"""The folder of a job: what lies in it, and whether a job may begin there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turbo_opt.calibration.jobs.schema import Job
from turbo_opt.errors import BadInput
from turbo_opt.kernels.whole_file import write_whole

JOB, MODEL, SAMPLES, REPORT = "job.json", "model", "samples", "report.json"
Report = dict[str, Any]
"""What a job ends with, as JSON data."""
Progress = Callable[[str, int, int, str], None]
"""Told (what, done, in all, note)."""


def begin_job(out: Path, job: Job, resume: bool) -> None:
    """Make the folder and write a new job into it; one that is there is not touched.

    Raises:
        BadInput: something else is there, or a job that is not to be resumed.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise BadInput(f"{out}: exists and is no folder")
    ours = (out / JOB).is_file()
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise BadInput(f"{out}: exists and is no folder of a job; choose another --out")
    if ours and not resume:
        raise BadInput(
            f"{out}: holds a job already; --resume continues it, or choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    if not ours:
        write_job(out, job)


def write_job(out: Path, job: Job) -> None:
    """Write the job into its folder, in one step."""
    content = json.dumps(job.canonical(), indent=1) + "\n"
    write_whole(out / JOB, content)
