"""The guide's commands for Wan2.1 1.3B on several GPUs, in short, on a model of random weights.

    python -m benchmarks.training_guide.larger --gpus 2 --work work/larger --out benchmarks/results
    python -m benchmarks.training_guide.larger --gpus 2 --work work/larger --tiny     # a CPU

The section's commands run one after the other as docs/training.md has them, with the same YAML
files: clips of a teacher, a distilled student, its sparse tuning, the artifact of both, a clip of
the model's size. Added to them is only what makes them short (`cut`): fewer clips, steps and
evaluations, a clip a GPU in a batch, and a folder of random weights with text encoder and VAE in
place of the released model. So they say whether all of it fits together at this size and what it
takes, and nothing of quality. The record is how many minutes the commands took in all.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import results
from benchmarks.compile_large import write_checkpoint
from benchmarks.components import SMALL, Size, write_components
from benchmarks.forward import CASES
from benchmarks.results import Record
from benchmarks.training import read_log, step_seconds
from benchmarks.training_guide.__main__ import FILE
from benchmarks.training_guide.document import LARGER, TITLE, Command, commands, write_files
from benchmarks.training_guide.parts import Parts
from turbo_opt.calibration.places import CHECKPOINTS, REPORT
from turbo_opt.calibration.training.logs import CSV

CAPTIONS = (
    "a cat on a surfboard",
    "a red circle moves left to right on a blue background",
    "rain on the windows of a tram at night",
    "a chef slices a lemon, close up",
    "two dogs run along a beach at sunset",
    "time lapse of clouds over mountains",
)
HELD_OUT = 2
_NO_COMPILER = ("training.compile=false", "training.compute_dtype=float32")


def cut(command: Command, gpus: int, steps: int, teacher: Path, *, tiny: bool) -> Command:
    """A command of the section with less of everything.

    Args:
        gpus: in place of the section's, where it runs on several.
        steps: of a training.
        teacher: in place of the released model.
        tiny: on a CPU, where clips are of 5 frames of 32 × 32 pixels.
    """
    options: list[str] = []
    settings: list[str] = []
    clip = ("generate.height=32", "generate.width=32", "generate.num_frames=5") if tiny else ()
    if command.name == "data":
        settings = [f"model.source={teacher}", "generate.num_inference_steps=4", *clip]
    elif command.trains:
        settings = [f"teacher.source={teacher}", f"data.held_out={HELD_OUT}"]
        settings += [f"training.steps={steps}", f"training.batch={gpus}", "log.every=1"]
        settings += _NO_COMPILER if tiny else ()
        if command.name == "rcm":
            settings.append(f"rcm.warm_up={steps // 2}")
    elif command.name == "run":
        settings = [f"model.source={teacher}", f"weights.base={teacher}", *clip]
        options = ["--no-verify", "--no-cache"] if tiny else []
    if tiny and command.name != "run":
        options = ["--device", "cpu"]
    processes = gpus if command.processes > 1 else 1
    return Command(processes, command.with_settings(options, settings).words)


def told(folder: Path) -> dict[str, Any]:
    """What a record keeps of a finished training: held-out losses, memory, seconds, bytes."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    rows = read_log(folder / CSV)
    peaks = [float(row["peak_gib"]) for row in rows if row.get("peak_gib")]
    saved = sum(path.stat().st_size for path in (folder / CHECKPOINTS).rglob("*.distcp"))
    return {
        **{name: report[name] for name in ("steps", "before", "after")},
        "peak_gib": max(peaks, default=None),
        "median_seconds_per_step": median(step_seconds(rows)[2:]),
        "checkpoints_gb": saved / 1e9,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run what is left of the section; 3 if the budget ended before that, so that it goes on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_guide.larger")
    add = parser.add_argument
    add("--gpus", type=int, required=True, help="processes of the commands that take several")
    add("--steps", type=int, default=20, help="of each training")
    add("--work", type=Path, required=True, help="where the commands run: 110 GB for 1.3B")
    add("--out", type=Path, default=results.RESULTS, help=f"where {FILE} is written")
    add("--budget", type=float, help="seconds of this call, after which the same command goes on")
    add("--tiny", action="store_true", help="a tiny model on a CPU: that it runs")
    options = parser.parse_args(arguments)
    if options.gpus < 2 or options.steps < 3:
        parser.error("--gpus: the section is of 2 or more; --steps: at least 3, two are not timed")
    work, case = options.work.absolute(), CASES["tiny" if options.tiny else "1.3b"]
    teacher = work / "teacher"
    if not teacher.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        device = torch.device("cpu" if options.tiny else "cuda")
        whole = work / "teacher.part"
        write_checkpoint(whole, case.config, sparse=False)
        write_components(whole, case.config["text_dim"], SMALL if options.tiny else Size(), device)
        whole.rename(teacher)
    write_files(TITLE, work)
    (work / "captions.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    how = {"steps": options.steps, "teacher": teacher, "tiny": options.tiny}
    said = [cut(command, options.gpus, **how) for command in commands(LARGER)]
    parts = Parts(work, said, least=lambda *_: 0.0)
    if not parts.run(options.budget):
        print("the same command goes on from here", flush=True)
        return 3
    from benchmarks.kernels._harness import Session  # turns off the cache of tuned kernels

    session = Session(dry=options.tiny)
    record = Record(
        name=f"{session.gpu}/{case.name}/training_guide/{options.gpus}-gpus/minutes",
        value=sum(parts.minutes()),
        unit="minutes",
        spread=0.0,
        runs=1,
        config={
            "commands": [" ".join(command.words).replace(f"{work}/", "") for command in said],
            "processes": [command.processes for command in said],
            "minutes": parts.minutes(),
            "captions": len(CAPTIONS),
            "trainings": {
                str(command.parsed()["out"]): told(work / command.parsed()["out"])
                for command in said
                if command.trains
            },
        },
        environment=session.environment,
        commit=results.current_commit(),
        date=results.today(),
    )
    results.merge(options.out / FILE, [record])
    print(results.tabulate([record]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
