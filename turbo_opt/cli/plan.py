"""`turbo-opt plan`: what a run would do, without reading a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from turbo_opt.cli.selection import checked_pipeline, select_recipe, selection_options
from turbo_opt.cli.session import Session, common_options, pass_session
from turbo_opt.errors import BadInput

if TYPE_CHECKING:
    from turbo_opt.compiler.validation import PlannedPass
    from turbo_opt.config.schema import Recipe
    from turbo_opt.ir.program import Program


@click.command()
@selection_options
@common_options
@pass_session
def plan(session: Session, **selection: Any) -> None:
    """Show what a run would do, without reading weights.

    The order of the passes, their matches and near misses, the weights before and after, the
    evaluations per clip, how much memory it takes, and what is kept between steps. RECIPE is as for
    `turbo-opt run`.
    """
    recipe = select_recipe(**selection)
    pipeline = checked_pipeline(recipe)

    from turbo_opt.artifact.manifest import jsonable
    from turbo_opt.cli.clip_size import check_clip_size
    from turbo_opt.cli.progress import Board
    from turbo_opt.compiler.build import capture_recipe
    from turbo_opt.compiler.manager import PassManager, Verification
    from turbo_opt.compiler.validation import check_files

    check_files(pipeline)
    with Board(session) as board, board.step(f"capture {recipe.model.source}"):
        captured = capture_recipe(recipe)
    check_clip_size(recipe, captured)
    missing = _missing(pipeline, captured)
    optimized = None
    if not missing:
        optimized = PassManager(pipeline, verification=Verification("off")).run(captured)
    record = jsonable(_record(recipe, pipeline, captured, optimized, missing))
    _show(session, record)
    if missing:
        raise BadInput("\n".join(_lacking(pipeline, missing)))


def _missing(pipeline: list[PlannedPass], program: Program) -> dict[str, list[str]]:
    """Pass name → globs over weight names that the checkpoint does not satisfy."""
    from turbo_opt.compiler.validation import with_known_weights

    found = {
        item.spec.name: item.pass_class.missing_weights(item.options, program)
        for item in with_known_weights(pipeline)
    }
    return {name: globs for name, globs in found.items() if globs}


def _lacking(pipeline: list[PlannedPass], missing: Mapping[str, list[str]]) -> list[str]:
    from turbo_opt.compiler.validation import missing_weights_message

    return [
        str(item.spec.error(missing_weights_message(item, missing[item.spec.name])))
        for item in pipeline
        if item.spec.name in missing
    ]


def _record(
    recipe: Recipe,
    pipeline: list[PlannedPass],
    captured: Program,
    optimized: Program | None,
    missing: Mapping[str, list[str]],
) -> dict[str, Any]:
    from turbo_opt.compiler.records import pass_row

    history = optimized.history if optimized is not None else [{}] * len(pipeline)
    rows = [
        {
            **pass_row({"name": item.spec.name, "text": str(item.spec), **record}),
            "numerics": item.pass_class.numerics.value,
            "needs_weights": list(item.pass_class.needs_weights),
            "missing_weights": missing.get(item.spec.name, []),
        }
        for item, record in zip(pipeline, history, strict=True)
    ]
    last = optimized if optimized is not None else captured
    return {
        "model": recipe.model.source,
        "dtype": recipe.model.dtype,
        "target": recipe.target,
        "passes": rows,
        "weight_bytes_before": captured.weight_bytes,
        "weight_bytes_after": last.weight_bytes if optimized is not None else None,
        "steps": len(last.schedule.steps),
        "evaluations_per_clip": last.schedule.evaluations,
        "memory": _memory(recipe, captured, last),
    }


def _memory(recipe: Recipe, captured: Program, optimized: Program) -> dict[str, Any]:
    """Estimates in bytes: to compile, and to run at the recipe's clip size."""
    from turbo_opt.cli.clip_size import granularity, latent_shape
    from turbo_opt.cli.memory import kept_bytes, peak_activation_bytes

    grain, text_tokens = granularity(captured), recipe.generate.max_sequence_length
    peak = None
    kept: Counter[str] = Counter()
    if grain is not None:
        latents = latent_shape(recipe, grain)
        peak = max(peak_activation_bytes(item, latents, text_tokens) for item in optimized)
        for item in optimized:
            kept.update(kept_bytes(item, optimized.schedule, latents, text_tokens))
    largest = max(tensor.nbytes for item in captured for tensor in item.weights.values())
    return {
        "largest_weight_bytes": largest,
        "weights_on_device_bytes": optimized.weight_bytes,
        "activations_bytes": peak,
        "kept_bytes": dict(kept) or None,
        "run_bytes": None if peak is None else optimized.weight_bytes + peak + kept["clip"],
    }


def _first_of(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def _kept(kept: Mapping[str, int] | None) -> str:
    from turbo_opt.cli.tables import size

    if kept is None:
        return "nothing"
    return (
        f"{size(kept['shape'])} a clip size, {size(kept['prompt'])} a prompt, "
        f"{size(kept['timestep'])} a noise level: {size(kept['clip'])} for a clip"
    )


def _show(session: Session, record: dict[str, Any]) -> None:
    from turbo_opt.cli.tables import NOTHING, choice_lines, near_miss_lines, pairs, size, table

    rows = [
        (
            number,
            row["text"],
            row["numerics"],
            NOTHING if row["matches"] is None else row["matches"],
            row["near_misses"],
            size(row["weight_bytes_after"]),
            _first_of(row["missing_weights"]) or NOTHING,
        )
        for number, row in enumerate(record["passes"], 1)
    ]
    columns = (
        ">#", "pass", "numerics", ">matches", ">near misses", ">weights", "missing weights",
    )  # fmt: skip
    memory = record["memory"]
    before, after = size(record["weight_bytes_before"]), size(record["weight_bytes_after"])
    values = {
        "model": f"{record['model']} in {record['dtype']}, for {record['target']}",
        "weights": f"{before} → {after}",
        "evaluations": f"{record['evaluations_per_clip']} per clip, in {record['steps']} steps",
        "to run": f"about {size(memory['run_bytes'])} for the networks: weights "
        f"{size(memory['weights_on_device_bytes'])}, activations "
        f"{size(memory['activations_bytes'])}, and what is kept",
        "kept between steps": _kept(memory["kept_bytes"]),
        "to compile": f"one weight at a time, the largest {size(memory['largest_weight_bytes'])}",
    }
    lines = [*near_miss_lines(record["passes"]), *choice_lines(record["passes"])]
    session.report(record, table(columns, rows), *lines, pairs(values))
