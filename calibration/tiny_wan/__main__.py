"""Train, assemble and evaluate tiny-wan: ``python -m turbo_opt.calibration.tiny_wan STAGE …``.

The stage ``students`` trains on the tiny-wan that ships, and is not part of ``all``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .assemble import assemble
from .evaluate import Evaluation, evaluate, load_pipeline, write_report
from .students import StudentTraining, train_students
from .train_denoiser import DenoiserTraining, train_denoiser
from .train_vae import VAETraining, train_vae
from .training import Budget


def main(arguments: list[str] | None = None) -> int:
    """Run one stage or all; 1 if a training has budget left or the quality falls short, else 0."""
    options = _parser().parse_args(arguments)
    options.device = torch.device(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    folder = "students" if options.stage == "students" else "tiny_wan"
    options.out = options.out or options.work / folder
    options.work.mkdir(parents=True, exist_ok=True)
    stages = ["vae", "denoiser", "assemble", "evaluate"]
    for stage in stages if options.stage == "all" else [options.stage]:
        print(f"--- {stage}", flush=True)
        if not _STAGES[stage](options):
            return 1
    return 0


def _run_vae(options: argparse.Namespace) -> bool:
    settings = _override(
        VAETraining(),
        batch=options.vae_batch,
        scenes=options.clips,
        peak_rate=options.vae_rate,
        measured_clips=options.vae_clips,
        **_common(options),
    )
    minutes = options.vae_minutes if options.stage == "all" else options.minutes
    budget = _budget(options, minutes)
    return train_vae(settings, budget, options.work, options.device, options.resume)


def _run_denoiser(options: argparse.Namespace) -> bool:
    settings = _override(
        DenoiserTraining(),
        batch=options.batch,
        clips=options.clips,
        peak_rate=options.rate,
        **_common(options),
    )
    budget = _budget(options, options.minutes)
    return train_denoiser(settings, budget, options.work, options.device, options.resume)


def _run_assemble(options: argparse.Namespace) -> bool:
    sizes = assemble(options.work, options.out)
    print(json.dumps(sizes, indent=2), flush=True)
    return True


def _run_evaluate(options: argparse.Namespace) -> bool:
    pipeline = load_pipeline(options.out, options.device)
    reports = []
    for guidance in options.guidance:
        settings = _override(
            Evaluation(guidance_scale=guidance),
            prompts=options.prompts,
            steps=options.sampling_steps,
            batch=options.sampling_batch,
            vae_clips=options.vae_clips,
            seed=options.seed,
        )
        sheet = options.work / f"contact-sheet-guidance-{guidance:g}.png"
        report = evaluate(pipeline, settings, sheet)
        reports.append(report)
        write_report(options.work / "evaluation.json", reports)
        summary = {
            "guidance": guidance,
            **report["accuracy"],
            "passed": report["passed"],
        }
        print(json.dumps(summary | {"all_right": report["all_right"], "vae": report["vae"]}))
    return any(report["passed"] for report in reports)


def _run_students(options: argparse.Namespace) -> bool:
    settings = _override(
        StudentTraining(),
        minutes=options.minutes,
        steps=options.steps,
        clips=options.clips,
        batch=options.batch,
        compile=options.device.type == "cuda" and not options.no_compile,
        seed=options.seed,
    )
    sizes = train_students(settings, options.work, options.out, options.device, options.finished)
    print(json.dumps(sizes, indent=2), flush=True)
    return True


_STAGES = {
    "vae": _run_vae,
    "denoiser": _run_denoiser,
    "assemble": _run_assemble,
    "evaluate": _run_evaluate,
    "students": _run_students,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m turbo_opt.calibration.tiny_wan")
    parser.description = "Train, assemble and evaluate the embedded model."
    add = parser.add_argument
    add("stage", choices=[*_STAGES, "all"])
    add("--work", type=Path, required=True, help="checkpoints, loss curves and reports")
    add(
        "--out",
        type=Path,
        help="the assembled diffusers folder (default: WORK/tiny_wan), or the students' weights "
        "and logs (default: WORK/students)",
    )
    add("--device", help="default: cuda if there is one")
    add("--seed", type=int)
    add(
        "--finished",
        type=Path,
        help="students that are taken over and not trained again, as an earlier --out has them",
    )

    budget = parser.add_argument_group("budget")
    add = budget.add_argument
    add(
        "--minutes",
        type=float,
        default=10.0,
        help="whole training, over all of its runs",
    )
    add("--vae-minutes", type=float, default=5.0, help="the VAE's part of 'all'")
    add("--steps", type=int, help="whole training in steps, whatever the time")
    add(
        "--stop-after",
        type=float,
        metavar="MINUTES",
        help="stop this run, to be resumed",
    )
    add("--resume", action="store_true", help="continue from WORK")

    sizes = parser.add_argument_group("sizes and settings (defaults: those of the shipped model)")
    add = sizes.add_argument
    add("--clips", type=int, help="scenes to train on")
    add("--vae-batch", type=int)
    add("--vae-rate", type=float)
    add("--vae-clips", type=int, help="scenes that measure the VAE")
    add("--batch", type=int, help="the denoiser's batch, or the students'")
    add("--rate", type=float, help="the denoiser's peak learning rate")
    add("--log-every", type=int)
    add("--no-compile", action="store_true")
    add("--no-mixed-precision", action="store_true")

    scoring = parser.add_argument_group("evaluation")
    add = scoring.add_argument
    add("--prompts", type=int)
    add("--sampling-steps", type=int)
    add("--sampling-batch", type=int)
    add("--guidance", type=float, nargs="+", default=[Evaluation().guidance_scale])
    return parser


def _common(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "log_every": options.log_every,
        "compile": False if options.no_compile else None,
        "mixed_precision": False if options.no_mixed_precision else None,
    }


def _budget(options: argparse.Namespace, minutes: float) -> Budget:
    return Budget(minutes=minutes, steps=options.steps, stop_after=options.stop_after)


def _override(settings: Any, **changes: Any) -> Any:
    """Replace the settings that were given on the command line."""
    return dataclasses.replace(
        settings,
        **{name: value for name, value in changes.items() if value is not None},
    )


if __name__ == "__main__":
    sys.exit(main())
