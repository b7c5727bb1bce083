"""What docs/training.md says: its YAML files, and its command lines as a shell reads them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.results import ROOT
from turbo_opt.cli.main import cli

GUIDE = ROOT / "docs" / "training.md"
TITLE, LARGER = "From a teacher to a four-step sparse student", "Wan2.1 1.3B, on several GPUs"
_RECORD = """
say() { printf '%s\\0' "$@"; echo; }
turbo-opt() { say 1 "$@"; }
torchrun() { [ "$1 $3 $4" = "--nproc-per-node -m turbo_opt" ] && say "$2" "${@:5}"; }
"""
"""Has a shell say what it would run: the number of processes, then the arguments."""
_SIZE = ("generate.height=32", "generate.width=32", "generate.num_frames=5")
_TRAINING = (
    *("training.steps=5", "training.minutes=null", "training.batch=2", "data.held_out=1"),
    *("training.compile=false", "training.compute_dtype=float32"),
)
_CUTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "data": (("--count", "4", "--device", "cpu"), (*_SIZE, "generate.num_inference_steps=1")),
    "rcm": (("--device", "cpu"), _TRAINING),
    "sla": (("--device", "cpu"), _TRAINING),
    "run": (("--no-cache", "--no-verify"), _SIZE),
    "generate": (("--device", "cpu"), ()),
}
"""Command → options and settings of less work."""


@dataclass(frozen=True)
class Command:
    """A command line of the guide.

    Attributes:
        processes: that run it.
        words: the arguments of `turbo-opt`.
    """

    processes: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """The command, or the kind of job of a calibration."""
        return self.words[1] if self.words[0] == "calibrate" else self.words[0]

    @property
    def trains(self) -> bool:
        """Whether it is a job that `--resume` continues."""
        return self.name in ("rcm", "sla")

    @property
    def shorter(self) -> Command:
        """The command with the options and settings that cut it down."""
        return self.with_settings(*_CUTS[self.name])

    def with_settings(self, options: Sequence[str], settings: Sequence[str]) -> Command:
        """The command with more options, and with settings that overrule its own."""
        said = [word for setting in settings for word in ("--set", setting)]
        return Command(self.processes, (*self.words, *options, *said))

    def parsed(self) -> dict[str, Any]:
        """What the command itself makes of its arguments."""
        words, command = list(self.words), cli
        while isinstance(command, click.Group):
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None, self.words
            command = found
        return command.make_context(self.name, words).params


def commands(title: str) -> list[Command]:
    """The command lines of a section's shell block."""
    (script,) = _blocks(_section(title), "sh")
    said = subprocess.run(
        ["bash", "-euc", _RECORD + script], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split("\0")[:-1] for line in said.splitlines()]
    return [Command(int(count), tuple(words)) for count, *words in lines]


def write_files(title: str, folder: Path) -> list[str]:
    """Write a section's YAML files, each by the name in its first line; their names.

    Raises:
        ValueError: a block does not say its name.
    """
    names = []
    for text in _blocks(_section(title), "yaml"):
        name = re.match(r"# (\w+\.yaml)\n", text)
        if name is None:
            raise ValueError(f"{GUIDE}: a YAML block does not begin with its file's name:\n{text}")
        (folder / name[1]).write_text(text, encoding="utf-8")
        names.append(name[1])
    return names


def _section(title: str) -> str:
    """A section's text, up to the next heading."""
    text = GUIDE.read_text(encoding="utf-8")
    found = re.search(rf"^##+ {re.escape(title)}$(.*?)^##", text, re.M | re.S)
    if found is None:
        raise ValueError(f"{GUIDE}: has no section {title!r}")
    return found[1]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
