"""From nothing to the frames of a clip: a fresh process loads an artifact and makes one.

    python -m benchmarks.cold_start --model 1.3b --work DIR --out results/

A synthetic model of random weights, as large as the real one, text encoder and VAE included, is
compiled by the model's recipe of four steps for an H200. Each run is a process of its own, timed
from its start, interpreter and imports included, to the frames of a clip of the model's size in
host memory. Once with empty caches of compiled kernels (Triton's and ours), so that every kernel is
compiled and tuned, and then with what that run left behind. All files are in the page cache in
both. Without a GPU, `--dry-run` makes the clip on the CPU: it proves that the script runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks import results
from benchmarks.compile_large import write_checkpoint
from benchmarks.components import SMALL, Size, write_components
from benchmarks.forward import CASES, Case
from benchmarks.kernels._harness import Session
from benchmarks.results import ROOT, Record

_RECIPES = {
    "1.3b": "wan2.1-t2v-1.3b/h200-turbo",
    "14b": "wan2.1-t2v-14b/h200-turbo",
    "tiny": "wan2.1-t2v-1.3b/h200-turbo",
}
_CACHES = ("TRITON_CACHE_DIR", "TURBO_OPT_KERNEL_CACHE")
_PROMPT = "a large red circle moves from left to right on a blue background" + ", slowly" * 70
_PROCESS = """
import json, sys, time
import torch
import turbo_opt
from turbo_opt.runtime.generate import generate
path, device, size, prompt, began = sys.argv[1:]
marks = [("start_s", time.time())]
artifact = turbo_opt.load(path, device=device)

def mark(name):
    if device == "cuda":
        torch.cuda.synchronize()
    marks.append((name, time.time()))

def note(stage, done, total):
    if (stage, done) in {("text", 1), ("decode", 1)}:
        mark(stage + "_s")
    elif stage == "denoise" and done == 1:
        mark("step_s")
    elif stage == "denoise" and done == total:
        mark("steps_s")

mark("load_s")
frames = generate(artifact, prompt, progress=note, **json.loads(size))
assert frames.std() > 0
before = [float(began), *(when for _, when in marks)]
parts = {name: when - last for (name, when), last in zip(marks, before)}
print(json.dumps({**parts, "total_s": marks[-1][1] - float(began)}))
"""
PARTS = ("start_s", "load_s", "text_s", "step_s", "steps_s", "decode_s")
"""What a run's seconds go to: imports, the artifact, the prompt's embeddings (the text encoder and
the VAE are read then), the first step, the others, the frames."""


def prepare(model: str, work: Path, device: torch.device) -> Path:
    """The artifact; one that an earlier run left in `work` is used again."""
    artifact = work / f"artifact-{model}"
    if artifact.is_dir():
        return artifact
    checkpoint, config = work / f"checkpoint-{model}", dict(CASES[model].config)
    write_checkpoint(checkpoint, config)
    size = SMALL if model == "tiny" else Size()
    write_components(checkpoint, config["text_dim"], size, device)
    _python(
        ["-m", "turbo_opt", "--quiet", "run", _RECIPES[model], "--out", str(artifact),
         "--set", f"model.source={checkpoint}", "--set", f"weights.student={checkpoint}",
         "--no-verify", "--no-cache"]
    )  # fmt: skip
    return artifact


def first_clip(artifact: Path, device: str, case: Case, caches: Path) -> dict[str, float]:
    """Seconds of one process: those of `PARTS`, and in all."""
    folders = {name: str(caches / name.lower()) for name in _CACHES}
    frames, height, width = case.latent
    size = {"num_frames": 4 * (frames - 1) + 1, "height": 8 * height, "width": 8 * width}
    arguments = [str(artifact), device, json.dumps(size), _PROMPT, str(time.time())]
    output = _python(["-c", _PROCESS, *arguments], folders)
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]


def run(model: str, session: Session, work: Path, runs: int) -> list[Record]:
    """Measure with empty and with warm caches, each `runs` times."""
    case, device = CASES[model], session.device.type
    artifact = prepare(model, work, session.device)
    with tempfile.TemporaryDirectory(dir=work) as unused:
        first_clip(artifact, device, case, Path(unused))  # brings the files into the page cache
    found: dict[str, list[dict[str, float]]] = {"empty": [], "warm": []}
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=work) as caches:
            for state in found:
                found[state].append(first_clip(artifact, device, case, Path(caches)))
    return [_record(session, model, state, items) for state, items in found.items()]


def _record(session: Session, model: str, state: str, items: list[dict[str, float]]) -> Record:
    totals = sorted(item["total_s"] for item in items)
    parts = {key: median(item[key] for item in items) for key in items[0] if key != "total_s"}
    return session.add(
        f"{CASES[model].name}/first_clip_{state}_caches_s",
        median(totals),
        "s",
        (totals[-1] - totals[0]) / 2,
        len(totals),
        config={"recipe": _RECIPES[model], "latent": list(CASES[model].latent), **parts},
    )


def _python(arguments: list[str], variables: dict[str, str] | None = None) -> str:
    command, environment = [sys.executable, *arguments], {**os.environ, **(variables or {})}
    return subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, cwd=ROOT, env=environment
    ).stdout


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(CASES), default="1.3b")
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder for checkpoint and artifact: 18 GB for 1.3b",
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with --model tiny")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run --model tiny runs on the CPU", file=sys.stderr)
        return 2
    session = Session(dry=options.dry_run)
    records = run(options.model, session, options.work.resolve(), options.runs)
    results.merge(options.out / "cold_start.json", records)
    print(results.tabulate(records))
    for record in records:
        print(json.dumps({record.name: record.config}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
