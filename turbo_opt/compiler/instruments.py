"""What surrounds every pass: whoever wants to watch, time, print or check implements this.

Instruments see programs, they never change them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from turbo_opt.compiler.validation import PlannedPass
from turbo_opt.ir.printer import graph_text, op_count_diff, op_counts
from turbo_opt.ir.program import Program


class Instrument(Protocol):
    """Told of every pass as it runs."""

    def before_pass(self, index: int, planned: PlannedPass, program: Program) -> None:
        """The pass is about to run on `program`."""

    def match_found(self) -> None:
        """The running pass replaced one more match."""

    def after_pass(self, index: int, record: dict[str, Any], program: Program) -> None:
        """The pass is done and verified; `record` is its line in the history."""


class BaseInstrument:
    """Does nothing; to be derived from."""

    def before_pass(self, index: int, planned: PlannedPass, program: Program) -> None:
        """See Instrument."""

    def match_found(self) -> None:
        """See Instrument."""

    def after_pass(self, index: int, record: dict[str, Any], program: Program) -> None:
        """See Instrument."""


class IRDump(BaseInstrument):
    """Writes `003-fuse-norms.<denoiser>.txt` after every pass, and the change in op counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counts: dict[str, Any] = {}

    def before_pass(self, index: int, planned: PlannedPass, program: Program) -> None:
        if index == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(program, "000-captured")
        self._counts = {item.name: op_counts(item.exported) for item in program}

    def after_pass(self, index: int, record: dict[str, Any], program: Program) -> None:
        stem = f"{index + 1:03d}-{record['name']}"
        self._write(program, stem)
        changes = {
            item.name: op_count_diff(self._counts.get(item.name, {}), op_counts(item.exported))
            for item in program
        }
        path = self._folder / f"{stem}.ops.json"
        path.write_text(json.dumps(changes, indent=2) + "\n", encoding="utf-8")

    def _write(self, program: Program, stem: str) -> None:
        for denoiser in program:
            path = self._folder / f"{stem}.{denoiser.name}.txt"
            path.write_text(graph_text(denoiser.exported), encoding="utf-8")
