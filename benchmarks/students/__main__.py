"""Command line; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.compile_large import environment as cpu_environment
from benchmarks.kernels._harness import Session
from benchmarks.results import Record
from benchmarks.students.scorer import Scorer
from benchmarks.students.variants import MERGED, STUDENT, TEACHER, Variant, better_student, variants
from turbo_opt.calibration.flow import tensor_float

FILE = "tiny_wan_students.json"


@tensor_float()
def main(arguments: list[str] | None = None) -> int:
    """Score all variants, or those whose name contains `--only`; 1 if a row failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.students")
    add = parser.add_argument
    add("--students", type=Path, required=True, help="what `tiny_wan students` left in --out")
    add("--out", type=Path, default=results.RESULTS, help="where tiny_wan_students.json is written")
    add("--captions", type=int, default=512, help="clips; up to 1,145 have one of their own each")
    add("--batch", type=int, default=256)
    add("--classifier-steps", type=int, default=1500)
    add("--only", nargs="+", default=[""], help="variants whose name contains one of these")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="a CPU takes minutes a row")
    add("--dry-run", action="store_true", help="on a CPU: that it runs, not what it measures")
    options = parser.parse_args(arguments)
    session = Session(dry=options.dry_run)
    on_cpu = options.dry_run or options.device == "cpu"
    started = time.monotonic()
    scorer = Scorer(
        options.students,
        torch.device("cpu") if on_cpu else session.device,
        options.captions,
        options.batch,
        options.classifier_steps,
    )
    print(
        f"drawn clips: {json.dumps(scorer.drawn)}, {time.monotonic() - started:.0f} s", flush=True
    )
    options.out.mkdir(parents=True, exist_ok=True)
    done: dict[Variant, dict[str, float]] = {}
    for variant in variants(options.dry_run):
        wanted = any(text in variant.name for text in options.only)
        if not wanted or (on_cpu and variant.scheme == "fp8-block"):
            continue
        scorer.student = better_student(done)
        if missing := scorer.lacks(variant):
            print(f"{variant.name}: left out, there is no {missing.name}", flush=True)
            continue
        try:
            scores, videos = scorer.measure(variant)
        except Exception as error:  # one row's failure must not cost the others
            session.failures.append(variant.name)
            print(f"{variant.name}: failed ({type(error).__name__}: {error})", flush=True)
            continue
        done[variant] = scores
        record = _record(variant, done, scorer, session, options)
        results.merge(options.out / FILE, [record])
        shown = {name: round(value, 4) for name, value in scores.items()}
        print(f"{variant.name}: {json.dumps(shown)}", flush=True)
        if variant in _SHOWN:
            sheet = variant.name.replace("/", "-")
            scorer.sheet(videos, options.out / f"students-{sheet}.png")
    print(f"student is {scorer.student}; all in {time.monotonic() - started:.0f} s", flush=True)
    return 1 if session.failures else 0


_SHOWN = (Variant(TEACHER, 1), Variant(MERGED, 4, topk=0.2, scheme="int8-block"))
"""Whose clips are kept."""


def _record(
    variant: Variant,
    done: Mapping[Variant, Mapping[str, float]],
    scorer: Scorer,
    session: Session,
    options: argparse.Namespace,
) -> Record:
    scores = done[variant]
    on_cpu = options.device == "cpu" and not options.dry_run
    judged = {f"drawn_{name}": value for name, value in scorer.drawn.items()}
    judged |= {"clips": options.captions, "captions": scorer.captions}
    place = f"{'cpu' if on_cpu else session.gpu}/tiny-wan/students"
    return Record(
        name=f"{place}/{variant.name}",
        value=scores["all_right"],
        unit="share of clips with all four attributes right",
        spread=0.0,
        runs=options.captions,
        baseline=_teacher(done, results.read(options.out / FILE), place, judged),
        quality={name: value for name, value in scores.items() if name != "all_right"},
        config={
            **asdict(variant),
            **({"student": scorer.student} if variant.weights in (STUDENT, MERGED) else {}),
            "evaluations": variant.evaluations,
            **judged,
        },
        environment=cpu_environment() if on_cpu else session.environment,
        commit=results.current_commit(),
        date=results.today(),
    )


def _teacher(
    done: Mapping[Variant, Mapping[str, float]],
    records: Sequence[Record],
    place: str,
    judged: Mapping[str, float],
) -> dict[str, float]:
    """The teacher's score: of this process, or of an earlier one that judged alike."""
    teacher = Variant(TEACHER, 50, guided=True)
    if teacher in done:
        return {"teacher": done[teacher]["all_right"]}
    for record in records:
        if record.name == f"{place}/{teacher.name}" and judged.items() <= record.config.items():
            return {"teacher": record.value}
    return {}


if __name__ == "__main__":
    sys.exit(main())
