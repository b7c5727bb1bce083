"""From nothing to the first denoised step: a fresh process loads an artifact and takes one step.

    python -m benchmarks.cold_start --model 1.3b --work DIR --out results/

A synthetic checkpoint of random weights is compiled by the model's sparse recipe for an H200. Each
run is a process of its own, timed from its start, interpreter and imports included, to the end of
the first of rCM's four steps at the model's clip size. Once with empty caches of compiled kernels
(Triton's and ours), so that every kernel is compiled and tuned, and then with what that run left
behind. The artifact's files are in the page cache in both. Without a GPU, `--dry-run` takes the
step on the CPU: it proves that the script runs.
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
from benchmarks.forward import CASES, Case
from benchmarks.kernels._harness import Session
from benchmarks.results import ROOT, Record

_RECIPES = {
    "1.3b": "wan2.1-t2v-1.3b/h200-sparse",
    "14b": "wan2.1-t2v-14b/h200-sparse",
    "tiny": "wan2.1-t2v-1.3b/h200-sparse",
}
_CACHES = ("TRITON_CACHE_DIR", "TURBO_OPT_KERNEL_CACHE")
_PROCESS = """
import json, sys, time
import torch
import turbo_opt
from benchmarks.forward import four_steps
from turbo_opt.ir.schedule import Schedule
from turbo_opt.runtime.sampler import initial_latents, sample
path, device, latent, began = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4])
imported = time.time()
artifact = turbo_opt.load(path, device=device)
loaded = time.time()
four = four_steps()
first = Schedule(four.steps[:1], initial_noise_scale=four.initial_noise_scale)
generator = torch.Generator().manual_seed(0)
shape = (1, artifact.config["in_channels"], *latent)
prompt = torch.randn(1, 512, artifact.config["text_dim"], generator=generator)
x = sample(
    artifact.transformers, first, prompt.to(device, artifact.dtype),
    latents=initial_latents(first, shape, generator, device), generator=generator,
)
assert x.isfinite().all()
done = time.time()
print(json.dumps({"start_s": imported - began, "load_s": loaded - imported,
                  "step_s": done - loaded, "total_s": done - began}))
"""


def prepare(model: str, work: Path) -> Path:
    """The artifact; one that an earlier run left in `work` is used again."""
    artifact = work / f"artifact-{model}"
    if artifact.is_dir():
        return artifact
    checkpoint = work / f"checkpoint-{model}"
    write_checkpoint(checkpoint, dict(CASES[model].config))
    _python(
        ["-m", "turbo_opt", "--quiet", "run", _RECIPES[model], "--out", str(artifact),
         "--set", f"model.source={checkpoint}", "--no-verify", "--no-cache"]
    )  # fmt: skip
    return artifact


def first_step(artifact: Path, device: str, case: Case, caches: Path) -> dict[str, float]:
    """Seconds of one process: until it runs, to load, for the step, and in all."""
    folders = {name: str(caches / name.lower()) for name in _CACHES}
    arguments = [str(artifact), device, json.dumps(case.latent), str(time.time())]
    output = _python(["-c", _PROCESS, *arguments], folders)
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]


def run(model: str, session: Session, work: Path, runs: int) -> list[Record]:
    """Measure with empty and with warm caches, each `runs` times."""
    case, device = CASES[model], session.device.type
    artifact = prepare(model, work)
    with tempfile.TemporaryDirectory(dir=work) as unused:
        first_step(artifact, device, case, Path(unused))  # brings the files into the page cache
    found: dict[str, list[dict[str, float]]] = {"empty": [], "warm": []}
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=work) as caches:
            for state in found:
                found[state].append(first_step(artifact, device, case, Path(caches)))
    return [_record(session, model, state, items) for state, items in found.items()]


def _record(session: Session, model: str, state: str, items: list[dict[str, float]]) -> Record:
    totals = sorted(item["total_s"] for item in items)
    parts = {key: median(item[key] for item in items) for key in items[0] if key != "total_s"}
    return session.add(
        f"{CASES[model].name}/cold_start_{state}_caches_s",
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
        "--work", type=Path, required=True, help="folder for checkpoint and artifact: 5 GB for 1.3b"
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
