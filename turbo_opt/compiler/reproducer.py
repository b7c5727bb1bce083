"""A failing pass leaves a folder from which the failure can be run again.

DIR/program/        the program as the pass found it (no weight data)
DIR/pipeline.txt    the failing pass in text form
DIR/error.txt       the message and the traceback
"""

from __future__ import annotations

import shutil
import tempfile
import traceback
from pathlib import Path

from turbo_opt.compiler.pipeline import PassSpec, format_pipeline, parse_pipeline
from turbo_opt.compiler.storage import read_program, write_program
from turbo_opt.errors import BadInput
from turbo_opt.ir.program import Program


def write_reproducer(folder: Path, program: Program, spec: PassSpec, error: BaseException) -> Path:
    """Write a reproducer to `folder`, replacing an older one, and give its path."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    (staging / "program").mkdir()
    write_program(program, staging / "program")
    (staging / "pipeline.txt").write_text(format_pipeline([spec]) + "\n", encoding="utf-8")
    text = "".join(traceback.format_exception(error))
    (staging / "error.txt").write_text(text, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    staging.chmod(0o755)
    return staging.rename(folder)


def read_reproducer(folder: Path) -> tuple[Program, tuple[PassSpec, ...]]:
    """The program and the failing pass.

    Raises:
        BadInput: the folder is no reproducer.
    """
    try:
        text = (folder / "pipeline.txt").read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{folder}: not a reproducer ({error.strerror})") from None
    return read_program(folder / "program"), parse_pipeline(text)
