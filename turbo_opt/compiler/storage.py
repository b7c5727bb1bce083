"""A Program on disk, weights unread: what the pass cache and the reproducers hold.

    DIR/program.json              schedule, components, facts, history, weight expressions
    DIR/<denoiser>.pt2            the weight-free graph

Weight expressions name their source files; constants are inside. No tensor data is copied.
"""

from __future__ import annotations

import json
from pathlib import Path

from turbo_opt.errors import BadInput
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Components, Denoiser, Program
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.weights import WeightStore, from_json, to_json


def write_program(program: Program, folder: Path) -> None:
    """Write `program` into an existing empty folder."""
    from turbo_opt.artifact.graph_file import graph_bytes

    record = {
        "denoisers": {
            denoiser.name: {
                "model_class": denoiser.model_class,
                "config": dict(denoiser.config),
                "weights": {name: to_json(tensor) for name, tensor in denoiser.weights.items()},
                "unread": {name: to_json(tensor) for name, tensor in denoiser.unread.items()},
                "stages": dict(denoiser.stages),
            }
            for denoiser in program
        },
        "schedule": program.schedule.to_json(),
        "components": vars(program.components),
        "facts": sorted(program.facts),
        "history": list(program.history),
    }
    (folder / "program.json").write_text(json.dumps(record, default=str), encoding="utf-8")
    for denoiser in program:
        (folder / f"{denoiser.name}.pt2").write_bytes(graph_bytes(denoiser.exported))


def read_program(folder: Path) -> Program:
    """The inverse of `write_program`.

    Raises:
        BadInput: the folder holds no whole program.
    """
    from turbo_opt.artifact.graph_file import read_graph

    try:
        record = json.loads((folder / "program.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: holds no stored program ({error})") from None
    denoisers = {}
    for name, item in record["denoisers"].items():
        weights, unread = (
            WeightStore({key: from_json(value) for key, value in item.get(part, {}).items()})
            for part in ("weights", "unread")
        )
        exported = read_graph(folder / f"{name}.pt2")
        stages = {stage: tuple(names) for stage, names in item.get("stages", {}).items()}
        denoisers[name] = Denoiser(
            name, exported, weights, item["model_class"], item["config"], stages, unread
        )
    components = record["components"]
    components["folders"] = {k: (v[0], v[1]) for k, v in components["folders"].items()}
    return Program(
        denoisers,
        Schedule.from_json(record["schedule"]),
        Components(**components),
        frozenset(Fact(fact) for fact in record["facts"]),
        tuple(record["history"]),
    )
