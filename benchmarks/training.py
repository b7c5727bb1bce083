"""Speed and memory of `turbo-opt calibrate` on one and several GPUs, by the command itself.

    python -m benchmarks.training --gpus 1 2 4 --work DIR --out results/
    python -m benchmarks.training --compile --work DIR --out results/
    python -m benchmarks.training --together 2 --gpus 2 8 --work DIR --out results/
    python -m benchmarks.training --jobs rcm-dense rcm-jvp --work DIR --out results/
    python -m benchmarks.training --tiny --gpus 1 2 --work DIR --out DIR    # CPU, a few seconds

A synthetic teacher (random weights) and synthetic clips of its size are written to `--work`. Each
job is then started as a user starts it, `torchrun -m turbo_opt calibrate …`, and stopped when it
has logged enough steps. `sla` and `rcm` train sparse students, `rcm-dense` and `rcm-jvp` dense
ones, the last by a forward-mode derivative in place of a difference, on one GPU. With N GPUs,
weights are sharded over all (FSDP2), and so many of them as `--together` says share the tokens of a
clip (all up to four, unless told); each such group has a clip of its own.

The ceiling counts the floating-point operations that a step cannot do without (the teacher's
forwards, the student's forward and backward, attention by the blocks that it keeps) at the rate of
a bf16 product measured in the same run, on all GPUs; recomputed activations are not in it.

`--resume` trains tiny-wan or, with `--resume 1.3b`, the model of the other jobs: on the most GPUs,
and the second half of the steps again on the fewest, from the checkpoint between. Recorded is how
far the two loss curves lie apart.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks import results
from benchmarks.compile_large import write_checkpoint
from benchmarks.forward import CASES, Case
from benchmarks.kernels._harness import Session
from benchmarks.results import Ceiling, Record
from turbo_opt.calibration.data.samples import (
    EMPTY_PROMPT,
    SampleIndex,
    SampleRecord,
    write_index,
    write_sample,
)
from turbo_opt.config.schema import EMBEDDED_MODEL

_CLIPS = 16
_TOPK = 0.1
_PROMPT_TOKENS = 120
_FORWARDS = {
    "sla": (1.0, 3.0),
    "rcm": (3.4, 3.7),
    "rcm-dense": (7.1, 0.0),
    "rcm-jvp": (7.1, 0.0),
}
"""Of dense and of sparse networks, for a step's mean; one with its backward counts 3.

Of five steps of rcm, one is the student's: the guided teacher twice (4) and the fake score once;
the student at two times, in 0 to 3 steps of a rollout and at their end, two of these with a
backward (8.5). Four are the fake score's: the student in a rollout of 1 to 4 steps (2.5), and
itself with a backward (3). In `rcm` the student is sparse. A forward-mode derivative, as in
`rcm-jvp`, counts as the second time that it replaces.
"""
_LONGEST = 240.0  # seconds for a job to log its steps
_RESUMED_STEPS = 12


def write_samples(folder: Path, case: Case) -> None:
    """Random latents and embeddings of the model's size, and those of an empty prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    latents = (16, *case.latent)
    width = case.config["text_dim"]
    files = [f"{number:06d}.safetensors" for number in range(_CLIPS)]
    for file in files:
        clip = torch.randn(latents, generator=generator)
        write_sample(folder / file, clip, torch.randn(_PROMPT_TOKENS, width, generator=generator))
    write_sample(folder / EMPTY_PROMPT, None, torch.randn(1, width, generator=generator))
    index = SampleIndex(
        format=1,
        latents=latents,
        text_length=512,
        text_dim=width,
        samples=tuple(SampleRecord(file=file) for file in files),
    )
    write_index(folder, index)


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a job runs.

    Attributes:
        gpus: how many.
        compile: blocks through torch.compile.
        group: GPUs that share the tokens of a clip; None: all, but four at most.
    """

    gpus: int
    compile: bool = False
    group: int | None = None

    @property
    def together(self) -> int:
        """GPUs that share the tokens of a clip."""
        return self.group or min(self.gpus, 4)

    @property
    def clips(self) -> int:
        """Of a step."""
        return self.gpus // self.together

    def label(self, name: str) -> str:
        """A job's name with what is not as usual."""
        how = {
            "compiled": self.compile,
            f"{self.together}-a-clip": self.together != min(self.gpus, 4),
        }
        return "-".join([name, *(word for word, said in how.items() if said)])


def job(name: str, setup: Setup, work: Path, *, selective: bool = True) -> dict[str, Any]:
    """A job file's content."""
    command, _, kind = name.partition("-")
    said: dict[str, Any] = {
        "schema_version": 1,
        "job": command,
        "teacher": {"source": str(work / "teacher")},
        "data": {"folder": str(work / "clips"), "held_out": 0},
        "sla": {"topk": _TOPK, "block_q": 64, "block_k": 128},
        "training": {
            "steps": 1000,
            "batch": setup.clips,
            "context_parallel": setup.together,
            "activations": "selective" if selective else "keep",
            "compile": setup.compile,
        },
        "save": {"every": 1000},
        "log": {"every": 1},
    }
    if command == "rcm":
        # Neither sparse attention, shared tokens nor compiled blocks have a forward derivative.
        tangent = "jvp" if kind == "jvp" else "difference"
        said["rcm"] = {"warm_up": 0, "forward": {"tangent": tangent}}
    if kind:
        del said["sla"]
    return said


def operations(case: Case, name: str) -> float:
    """Floating-point operations per token that a step of the job takes at least.

    A product of a weight takes 2 a weight and token, dense attention 4·L·C a layer and token, its
    sparse form `topk` of that; a backward twice its forward. rcm's steps differ: their mean.
    """
    config = case.config
    frames, height, width = case.latent
    length = frames * height * width // 4
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    layer = 6 * channels**2 + 2 * channels * config["ffn_dim"]  # cross-attention's k, v left out
    linear = 2.0 * config["num_layers"] * layer
    attention = 4.0 * config["num_layers"] * length * channels
    dense, sparse = linear + attention, linear + _TOPK * attention
    dense_forwards, sparse_forwards = _FORWARDS[name]
    return dense_forwards * dense + sparse_forwards * sparse


def step_seconds(rows: Sequence[dict[str, str]]) -> list[float]:
    """Seconds of each logged step, from the means since the start that the log holds."""
    ends = [int(row["step"]) * float(row["seconds_per_step"]) for row in rows]
    return [after - before for before, after in zip([0.0, *ends], ends, strict=False)]


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log's steps; none if there is no log yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("seconds_per_step")]


def start(command: str, gpus: int, path: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """The command as torchrun starts it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    words = ["-m", "turbo_opt", "calibrate", command, str(path), "--out", str(out), *more]
    log = (out.parent / f"{out.name}.txt").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    return subprocess.Popen(
        [sys.executable, *launcher, *words], stdout=log, stderr=log, env=environment
    )


def steps_of(
    name: str, setup: Setup, work: Path, steps: int, longest: float, *, tiny: bool
) -> list[dict[str, str]]:
    """Rows of the first `steps` steps of a job, which is stopped then.

    Raises:
        SystemExit: the job ended or took too long.
    """
    path, out = work / f"{name}-{setup.gpus}.yaml", work / f"{name}-{setup.gpus}"
    shutil.rmtree(out, ignore_errors=True)  # the log of an earlier run is not this one's
    path.write_text(json.dumps(job(name, setup, work)), encoding="utf-8")  # JSON is YAML
    more = ("--device", "cpu") if tiny else ()
    process = start(name.partition("-")[0], setup.gpus, path, out, *more)
    deadline = time.monotonic() + longest
    try:
        while len(rows := read_log(out / "log.csv")) < steps:
            if process.poll() is not None or time.monotonic() > deadline:
                said = (work / f"{out.name}.txt").read_text(encoding="utf-8", errors="replace")
                raise SystemExit(
                    f"{name} on {setup.gpus} GPUs logged {len(rows)} steps:\n{said[-3000:]}"
                )
            time.sleep(0.2)
        return rows
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def speed_record(
    case: Case,
    name: str,
    setup: Setup,
    rows: Sequence[dict[str, str]],
    rate: Ceiling,
    session: Session,
) -> Record:
    """Tokens per second; rCM's steps differ, so that a whole round of five is one sample.

    Args:
        rate: of a bf16 product on one GPU that nothing else uses, in TFLOP/s.
    """
    frames, height, width = case.latent
    tokens = frames * height * width // 4 * setup.clips
    around = 1 if name == "sla" else 5
    skipped = max(2, around)  # they compile and tune; of rcm, the student's first step is the fifth
    seconds = step_seconds(rows)[skipped:]
    rounds = [
        around * tokens / sum(seconds[first : first + around])
        for first in range(0, len(seconds) - around + 1, around)
    ]
    low, _, high = quantiles(rounds, n=4) if len(rounds) > 1 else (rounds[0],) * 3
    bound = setup.gpus * rate.value * 1e12 / operations(case, name)
    value = median(rounds)
    peaks = [float(row["peak_gib"]) for row in rows if row.get("peak_gib")]
    return Record(
        name=f"{session.gpu}/{case.name}/calibrate-{setup.label(name)}/{setup.gpus}-gpus/tokens_per_s",
        value=value,
        unit="tokens/s",
        spread=(high - low) / 2,
        runs=len(rounds),
        ceiling=Ceiling(bound, "tokens/s", f"{setup.gpus} × {rate.what}, {rate.value:.0f} TFLOP/s"),
        share_of_ceiling=value / bound,
        config={
            "peak_gib": max(peaks, default=None),
            "seconds_per_step": tokens / value,
            "job": job(name, setup, Path("."))["training"],
            "topk": job(name, setup, Path(".")).get("sla", {}).get("topk"),
        },
        environment=session.environment,
        commit=results.current_commit(),
        date=results.today(),
    )


def resume_record(
    work: Path, case: Case | None, most: int, fewest: int, session: Session, *, tiny: bool
) -> Record:
    """Train on `most` processes, and the second half again on `fewest`, from the checkpoint.

    Args:
        case: of the model whose teacher and clips are in `work`, in bfloat16; None: tiny-wan, in
            float32.
    """
    name = EMBEDDED_MODEL if case is None else case.name
    folder = work / f"resume-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    said = job("sla", Setup(1), work)
    if case is None:
        write_samples(folder / "clips", Case(name, {"text_dim": 128}, (5, 24, 24), 1))
        said["teacher"], said["data"]["folder"] = {"source": name}, str(folder / "clips")
        said["training"] |= {"batch": 8, "rate": 1e-4, "compute_dtype": "float32"}
    else:
        said["training"] |= {"batch": most, "micro_batch": 1, "rate": 1e-5}
    # Rates follow from the share of all steps, so the second half is done again, not a first one
    # alone.
    half = _RESUMED_STEPS // 2
    said["training"]["steps"] = _RESUMED_STEPS
    said["save"] = {"every": half, "keep": 2}
    path, out = folder / "job.yaml", folder / "out"
    path.write_text(json.dumps(said), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    more = ("--device", "cpu") if tiny else ()

    def losses(gpus: int, *flags: str) -> list[float]:
        if start("sla", gpus, path, out, *more, *flags).wait(_LONGEST):
            text = (folder / "out.txt").read_text(encoding="utf-8", errors="replace")
            words = " ".join(["calibrate sla", *flags])
            raise SystemExit(f"{words} on {gpus} processes failed:\n{text[-3000:]}")
        return [float(row["loss"]) for row in read_log(out / "log.csv")]

    whole = losses(most)
    (out / "checkpoints" / "latest").write_text(f"step-{half:06d}\n", encoding="utf-8")
    resumed = losses(fewest, "--resume")
    pairs = list(zip(whole, resumed, strict=True))[half:]
    apart = max(abs(a - b) / a for a, b in pairs)
    return Record(
        name=f"{session.gpu}/{name}/calibrate-sla/resumed_loss_difference",
        value=apart,
        unit="relative",
        spread=0.0,
        runs=len(pairs),
        config={"from_processes": most, "to_processes": fewest,
                "dtype": said["training"].get("compute_dtype", "bfloat16"),
                "losses": whole, "resumed": resumed},
        environment=session.environment,
        commit=results.current_commit(),
        date=results.today(),
    )  # fmt: skip


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", nargs="+", choices=sorted(_FORWARDS), default=["rcm", "sla"])
    parser.add_argument("--steps", type=int, default=10, help="logged steps of each job")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--compile", action="store_true", help="blocks through torch.compile")
    parser.add_argument("--together", type=int, help="GPUs that share a clip's tokens")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=EMBEDDED_MODEL,
        choices=[EMBEDDED_MODEL, "1.3b"],
        help="only the loss after resuming, of this model",
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args()
    group = options.together
    if group is not None and (group < 1 or any(gpus % group for gpus in options.gpus)):
        parser.error(f"--together {group} does not divide each of --gpus {options.gpus}")
    if "rcm-jvp" in options.jobs and (options.compile or max(options.gpus) > 1):
        parser.error(
            "--jobs rcm-jvp: a forward-mode derivative takes blocks as written, on one GPU"
        )
    if options.steps < 10:
        parser.error(f"--steps {options.steps}: a round of rcm is five, and the first is not timed")
    if options.resume and (group is not None or options.compile):
        parser.error("--resume has blocks as written, and clips of their own for each GPU")
    session = Session(dry=options.tiny)
    options.work.mkdir(parents=True, exist_ok=True)
    out = options.out / "training.json"
    keep: Callable[[Record], None] = lambda record: results.merge(out, [record])  # noqa: E731
    case = CASES["tiny" if options.tiny else "1.3b"]
    if options.tiny:
        case = dataclasses.replace(case, config={**case.config, "num_attention_heads": 4})
    if options.resume != EMBEDDED_MODEL and not (options.work / "clips").is_dir():
        write_checkpoint(options.work / "teacher", case.config, sparse=False)
        write_samples(options.work / "clips", case)
    if options.resume:
        most, fewest = max(options.gpus), min(options.gpus)
        resumed = None if options.resume == EMBEDDED_MODEL else case
        keep(resume_record(options.work, resumed, most, fewest, session, tiny=options.tiny))
        return
    rate = session.bf16_matmul  # before any job, whose processes may outlive it for a while
    for name in options.jobs:
        for gpus in options.gpus:
            setup = Setup(gpus, options.compile, group)
            rows = steps_of(name, setup, options.work, options.steps, _LONGEST, tiny=options.tiny)
            keep(speed_record(case, name, setup, rows, rate, session))
    records = results.read(out)
    print(results.tabulate([record for record in records if math.isfinite(record.value)]))


if __name__ == "__main__":
    main()
