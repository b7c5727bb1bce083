"""`turbo-opt demo`: the whole way on the model inside the package, before and after."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from turbo_opt.cli.devices import device_option, resolve_device
from turbo_opt.cli.session import Session, common_options, pass_session
from turbo_opt.errors import BadInput

if TYPE_CHECKING:
    import numpy as np

    from turbo_opt.artifact.load import LoadedArtifact
    from turbo_opt.cli.progress import Board

_PROMPT = "a red circle moves left to right on a blue background"
_MARK = ".turbo-opt-demo"


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder for the artifact, the report and the clips.",
)
@click.option("--prompt", default=_PROMPT, show_default=True, help="What the clips show.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the first noise of both clips.",
)
@click.option(
    "--recipe",
    metavar="NAME",
    help="Recipe to compile.  [default: tiny-wan's for this machine]",
)
@device_option
@common_options
@pass_session
def demo(
    session: Session, out: Path, prompt: str, seed: int, recipe: str | None, device: str
) -> None:
    """Compile the built-in tiny-wan; a clip before and after.

    Leaves the artifact, a report with frames side by side, and both clips in the --out folder.
    """
    from turbo_opt.cli.places import check_artifact_place, plain_place
    from turbo_opt.cli.progress import Board
    from turbo_opt.cli.selection import checked_pipeline, demo_recipe_for, select_recipe

    out = plain_place(out)
    device = resolve_device(device)
    recipe = recipe or demo_recipe_for(device)
    chosen = select_recipe(recipe)
    pipeline = checked_pipeline(chosen)
    _check_folder(out)

    from turbo_opt.artifact.load import load
    from turbo_opt.cli.before_after import clip_text, compare, machine, unoptimized, warm_up
    from turbo_opt.cli.compile import Compilation, compile_recipe

    check_artifact_place(out / "artifact", overwrite=True)
    session.when_stopped = f"; {out} is not whole, the next demo replaces what it wrote"
    work = Compilation(chosen, pipeline, out / "artifact", overwrite=True)
    started = time.perf_counter()
    with Board(session) as board:
        with _owned(out):
            compiled = compile_recipe(work, board)
        with board.step("load"):
            after = load(compiled.out, device=device)
            before = unoptimized(compiled, after)
            warm_up([before, after])
        clips, seconds = {}, {}
        models = {"before": before, "after": after}
        for name, model in models.items():
            clips[name], seconds[name] = _generate(board, name, model, prompt, seed)
    metrics = compare(clips, seconds, prompt)
    metrics["evaluations"] = {name: model.schedule.evaluations for name, model in models.items()}
    record = {
        **compiled.to_json(),
        "recipe": recipe,
        "device": device,
        "machine": machine(device),
        "prompt": prompt,
        "seed": seed,
        "clip": clip_text(clips["after"]),
        "metrics": metrics,
        "seconds": time.perf_counter() - started,
    }
    _write(out, after, clips, record)
    _show(session, out, record)


def _check_folder(out: Path) -> None:
    """`out` is free, empty, or from an earlier demo."""
    from turbo_opt.cli.places import check_writable

    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: exists and is no folder")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise BadInput(f"{out}: exists and is not from an earlier demo; choose another --out")
    check_writable(out / _MARK)


@contextlib.contextmanager
def _owned(out: Path) -> Iterator[None]:
    """Mark the folder as a demo's before anything else is in it; bad input leaves no mark."""
    there, marked = out.is_dir(), (out / _MARK).is_file()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
    try:
        yield
    except BadInput:
        if not marked:
            (out / _MARK).unlink()
        if not there and not any(out.iterdir()):
            out.rmdir()
        raise


def _generate(
    board: Board, name: str, model: LoadedArtifact, prompt: str, seed: int
) -> tuple[np.ndarray, float]:
    from turbo_opt.cli.generate import Stages

    started = time.perf_counter()
    frames = model.generate(prompt, seed=seed, progress=Stages(board, f"{name}: "))
    return frames, time.perf_counter() - started


def _write(
    out: Path, artifact: LoadedArtifact, clips: dict[str, np.ndarray], record: dict[str, Any]
) -> None:
    from turbo_opt.artifact.report import render_report, report_data
    from turbo_opt.cli.before_after import report_entries
    from turbo_opt.runtime.generate import clip_options
    from turbo_opt.runtime.video import write_video

    options = clip_options(artifact.manifest)
    for name, clip in clips.items():
        write_video(clip, out / f"{name}.mp4", options.fps)
    data, added = report_data(artifact.manifest), report_entries(record)
    told = data["context"].get("recipe")
    recipe = {"recipe": f"{record['recipe']} ({told})" if told else record["recipe"]}
    data |= added | {"context": data["context"] | recipe | added["context"]}
    videos = {name: (out / f"{name}.mp4").read_bytes() for name in clips}
    pages = render_report(data, clips, videos)
    pages["report.json"] = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")


def _seen(found: dict[str, bool] | None) -> str:
    if found is None:
        return "not a caption of tiny-wan"
    return ", ".join(f"{name} {'yes' if right else 'NO'}" for name, right in found.items())


def _show(session: Session, out: Path, record: dict[str, Any]) -> None:
    from turbo_opt.cli.before_after import psnr_text
    from turbo_opt.cli.tables import decibels, near_miss_lines, pairs, pass_table, seconds, size

    metrics, totals = record["metrics"], record["totals"]
    evaluations = metrics["evaluations"]
    before, after = (metrics[f"seconds_per_clip_{name}"] for name in ("before", "after"))
    values = {
        "weights": f"{size(totals['weight_bytes_before'])} → {size(totals['weight_bytes_after'])}",
        "network evaluations": f"{evaluations['before']} → {evaluations['after']}",
        "seconds per clip": f"{seconds(before)} → {seconds(after)}, {metrics['speed_up']:.2f}×",
        "PSNR between the clips": psnr_text(metrics["psnr_db"]),
        **{
            f"end to end, {name}": decibels(value)
            for name, value in totals["end_to_end_sqnr_db"].items()
        },
        **{f"detected, {name}": _seen(found) for name, found in metrics["detected"].items()},
        "report": str(out / "report.html"),
        "all in": seconds(record["seconds"]),
    }
    table = pass_table(record["passes"], {**totals, "seconds": totals["pass_seconds"]})
    session.summary(record, table, *near_miss_lines(record["passes"]), pairs(values))
