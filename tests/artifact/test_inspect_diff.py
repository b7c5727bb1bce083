"""What is in an artifact, and how two of them differ."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.helpers.tiny_folder import tiny_program
from turbo_opt.artifact.diff import diff_artifacts
from turbo_opt.artifact.inspect import inspect_artifact
from turbo_opt.artifact.save import save
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.weights import constant


def test_inspect_tells_sizes_operators_dtypes_and_schedule(stored: Path) -> None:
    summary = json.loads(json.dumps(inspect_artifact(stored), allow_nan=False))
    network = summary["denoisers"]["transformer"]
    assert network["bytes_by_dtype"] == {"float32": tiny_program().weight_bytes}
    assert network["operators"]["aten.linear"] == 16
    assert network["operators"]["aten.scaled_dot_product_attention"] == 2
    assert (summary["schedule"]["steps"], summary["schedule"]["evaluations"]) == (3, 6)
    assert summary["target"] == "cpu"


def test_inspect_without_graphs_counts_no_operators(stored: Path) -> None:
    assert "operators" not in inspect_artifact(stored, graphs=False)["denoisers"]["transformer"]


def test_an_artifact_does_not_differ_from_itself(stored: Path) -> None:
    assert diff_artifacts(stored, stored)["same"]


def test_diff_names_the_weight_the_recipe_key_the_pass_and_the_step(
    stored: Path, tmp_path: Path
) -> None:
    program = tiny_program()
    weights = program.denoisers["transformer"].weights
    weights["proj_out.bias"] = constant(weights["proj_out.bias"].load() + 1)
    program.history = ({"name": "merge-weights", "matches": 1, "options": {"scale": 0.5}},)
    steps = program.schedule.steps[1:]
    program.schedule = Schedule(steps, program.schedule.scheduler)
    other = save(program, tmp_path / "b", recipe={"model": {"source": "other"}}, replay=False)
    found = diff_artifacts(stored, other)
    assert not found["same"]
    assert found["denoisers"]["transformer"]["weights"] == {
        "removed": [], "added": [], "changed": ["proj_out.bias"],
    }  # fmt: skip
    assert found["recipe"]["model.source"] == ["tiny", "other"]
    assert found["passes"]["01 merge-weights.options.scale"] == [None, 0.5]
    assert "steps[0].time" in found["schedule"]
    json.dumps(found, allow_nan=False)


def test_diff_shows_changed_dtypes_and_operators(stored: Path, tmp_path: Path) -> None:
    program = tiny_program()
    graph = program.denoisers["transformer"].graph
    gelu = next(node for node in graph.nodes if node.target is torch.ops.aten.gelu.default)
    gelu.replace_all_uses_with(gelu.args[0])
    graph.erase_node(gelu)
    other = save(program, tmp_path / "b", replay=False)
    found = diff_artifacts(stored, other)["denoisers"]["transformer"]
    assert found["operators"] == {"aten.gelu": -1}
