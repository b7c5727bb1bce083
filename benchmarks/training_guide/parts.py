"""Run commands one after the other in a folder, in several calls if time is short.

A part is one run of a command, to its end or until it was stopped; `parts.json` in the folder has
all of them, so that the next call knows where to go on and how long it took in all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.results import ROOT
from benchmarks.training_guide.document import Command
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import Job, SLAJob
from turbo_opt.calibration.places import JOB
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.kernels.whole_file import write_whole

PARTS = "parts.json"
AROUND_TRAINING = 90.0
"""Seconds for a training's imports, compilation, held-out losses and export, beside its minutes."""
_TO_STOP = 30.0
_KINDS: dict[str, type[Job]] = {"rcm": RCMJob, "sla": SLAJob}


@dataclass(frozen=True)
class Part:
    """One run of a command.

    Attributes:
        number: of the command, from 1.
        seconds: how long it ran.
        code: its exit code; None if it was stopped at the end of the budget.
    """

    number: int
    seconds: float
    code: int | None


def launcher(processes: int) -> list[str]:
    """How turbo-opt starts in so many processes: by torchrun if there are several."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), "-m", "turbo_opt"]


class Parts:
    """What has run in a folder, and what is left.

    Args:
        folder: where the commands run and the parts are written down.
        program: what the words of a command are given to, by the number of its processes.
        least: seconds that a command surely takes in that folder.
    """

    def __init__(
        self,
        folder: Path,
        commands: Sequence[Command],
        program: Callable[[int], Sequence[str]] = launcher,
        least: Callable[[Command, Path], float] | None = None,
    ) -> None:
        self._folder, self._commands, self._program = folder, commands, program
        self._least = least or least_seconds
        self.done = _read(folder / PARTS, commands)

    def run(self, budget: float | None = None) -> bool:
        """Run what is left; False if the budget of seconds ends before that.

        Raises:
            SystemExit: a command failed; its last lines are in the message.
        """
        deadline = None if budget is None else time.monotonic() + budget
        finished = {part.number for part in self.done if part.code == 0}
        for number, command in enumerate(self._commands, 1):
            if number in finished:
                continue
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and budget is not None and not self._fits(command, left, budget):
                print(f"{number} {command.name}: not begun, {max(left, 0):.0f} s are left")
                return False
            part = self._run(number, command, left)
            self.done.append(part)
            self._write()
            how = "stopped" if part.code is None else f"exit code {part.code}"
            print(f"{number} {' '.join(command.words)}: {part.seconds:.1f} s, {how}", flush=True)
            if part.code is None:
                return False
            if part.code != 0:
                text = self._log(number).read_text(encoding="utf-8", errors="replace")
                raise SystemExit(f"command {number} failed:\n{text[-3000:]}")
        return True

    def minutes(self) -> list[float]:
        """How long each command took, all of its parts together."""
        return [
            sum(part.seconds for part in self.done if part.number == number) / 60
            for number in range(1, len(self._commands) + 1)
        ]

    def _fits(self, command: Command, left: float, budget: float) -> bool:
        """Whether a command may begin: one that fits into no budget is stopped and resumed."""
        least = self._least(command, self._folder)
        return left > 0 and (left >= least or least > budget)

    def _run(self, number: int, command: Command, longest: float | None) -> Part:
        words = [*self._program(command.processes), *command.words]
        if command.trains and (self._folder / command.parsed()["out"] / JOB).is_file():
            words.append("--resume")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        started = time.monotonic()
        with self._log(number).open("ab") as log:
            process = subprocess.Popen(
                words, cwd=self._folder, stdout=log, stderr=log, env=environment
            )
            try:
                code: int | None = process.wait(longest)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _stop(process)
        return Part(number, time.monotonic() - started, code)

    def _log(self, number: int) -> Path:
        return self._folder / f"command-{number}.txt"

    def _write(self) -> None:
        said = {
            "commands": [list(command.words) for command in self._commands],
            "parts": [asdict(part) for part in self.done],
        }
        write_whole(self._folder / PARTS, json.dumps(said, indent=1) + "\n")


def least_seconds(command: Command, folder: Path) -> float:
    """What a training's file says of its minutes, and what is around them; 0 of other commands."""
    if not command.trains:
        return 0.0
    said = command.parsed()
    job = load_job(folder / said["job"], _KINDS[command.name], said["overrides"])
    minutes = job.training.minutes
    return 0.0 if minutes is None else 60 * minutes + AROUND_TRAINING


def _read(path: Path, commands: Sequence[Command]) -> list[Part]:
    if not path.is_file():
        return []
    said = json.loads(path.read_text(encoding="utf-8"))
    if said["commands"] != [list(command.words) for command in commands]:
        raise SystemExit(f"{path}: is of other commands; choose another folder")
    return [Part(**part) for part in said["parts"]]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, so that it can put away what is half done."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
