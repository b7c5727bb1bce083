"""Command line; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.training_guide.document import TITLE, Command, commands, write_files
from benchmarks.training_guide.parts import Parts
from benchmarks.training_guide.scores import ARTIFACT, shares_right
from turbo_opt.calibration.flow import tensor_float
from turbo_opt.calibration.places import MODEL, REPORT

FILE = "training_guide.json"
NAME = "tiny-wan/training_guide_minutes"
_SCORING, _TO_BEGIN = 90.0, 60.0
"""Seconds that drawing and judging may take on a GPU; that a training needs to be of use."""


@tensor_float()
def main(arguments: list[str] | None = None) -> int:
    """Run what is left of the guide; 3 if the budget ended before that, so that it goes on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_guide")
    add = parser.add_argument
    add("--work", type=Path, required=True, help="where the commands run; the same to go on")
    add("--out", type=Path, default=results.RESULTS, help=f"where {FILE} is written")
    add("--budget", type=float, help="seconds of this call, after which the same command goes on")
    add("--cut", action="store_true", help="begin trainings that the budget will stop")
    add("--captions", type=int, default=512)
    add("--batch", type=int, default=256, help="clips that are drawn at once")
    add("--tiny", action="store_true", help="on a CPU: that it runs, not what it measures")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    write_files(TITLE, work)
    said = [command.shorter if options.tiny else command for command in commands(TITLE)]
    parts = Parts(work, said, least=(lambda *_: _TO_BEGIN) if options.cut else None)
    whole = parts.run(options.budget)
    left = None if options.budget is None else options.budget - (time.monotonic() - started)
    if not whole or (left is not None and left < _SCORING < options.budget):
        print("the same command goes on from here", flush=True)
        return 3
    # Imported here, as it turns off the cache of tuned kernels, for the commands too.
    from benchmarks.kernels._harness import Session

    session = Session(dry=options.tiny)
    captions, steps = (4, 2) if options.tiny else (options.captions, 50)
    right = shares_right(
        work / _out(said, "run"),
        work / _out(said, "rcm") / MODEL,
        session.device,
        captions,
        options.batch,
        steps,
    )
    config = {
        "commands": [" ".join(command.words) for command in said],
        "minutes": parts.minutes(),
        "stopped": sum(part.code is None for part in parts.done),
        "failed": sum(part.code not in (None, 0) for part in parts.done),
        "captions": captions,
        "trainings": {
            str(command.parsed()["out"]): _told(work / command.parsed()["out"])
            for command in said
            if command.trains
        },
    }
    record = session.add(
        NAME, sum(parts.minutes()), "minutes", 0.0, 1, quality=_quality(right), config=config
    )
    results.merge(options.out / FILE, [record])
    print(results.tabulate([record]))
    return 0


def _out(said: Sequence[Command], name: str) -> str:
    """The `--out` of the last command of a kind."""
    return [str(command.parsed()["out"]) for command in said if command.name == name][-1]


def _quality(right: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Everything of the artifact, and of the others which share of their clips is all right."""
    others = {f"{who}_all_right": of["all_right"] for who, of in right.items() if who != ARTIFACT}
    return {**right[ARTIFACT], **others}


def _told(folder: Path) -> dict[str, Any]:
    """What a record keeps of a training's report."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return {name: report[name] for name in ("steps", "first_step", "before", "after")}


if __name__ == "__main__":
    sys.exit(main())
