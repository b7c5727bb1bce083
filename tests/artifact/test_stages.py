"""Stages are stored with an artifact, checked when it is loaded, and absent from older ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import turbo_opt
from tests.helpers.tiny_folder import TINY_RECIPE, tiny_program
from turbo_opt.artifact.inspect import inspect_artifact
from turbo_opt.artifact.manifest import MANIFEST
from turbo_opt.artifact.save import save
from turbo_opt.artifact.verify import verify
from turbo_opt.compiler.manager import PassManager
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.errors import BadInput


def hoisted(out: Path, experts: int = 1) -> Path:
    planned = validate_pipeline(parse_pipeline("canonicalize,hoist-invariants"))
    program = PassManager(planned).run(tiny_program(experts))
    return save(program, out, recipe=TINY_RECIPE)


def edit(artifact: Path, change: Any) -> None:
    path = artifact / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("experts", [1, 2])
def test_clips_of_a_staged_artifact_equal_those_of_the_captured_one(
    tmp_path: Path, stored: Path, stored_pair: Path, experts: int
) -> None:
    staged = turbo_opt.load(hoisted(tmp_path / "a", experts))
    assert len(staged.transformers) == experts
    whole = turbo_opt.load(stored if experts == 1 else stored_pair)
    for seed in (1, 2):
        clips = [item.generate("a red circle", seed=seed) for item in (staged, whole)]
        assert (clips[0] == clips[1]).all()
    assert all(item._staged is not None for item in staged.transformers.values())


def test_the_stored_replay_agrees_and_inspect_shows_the_stages(tmp_path: Path) -> None:
    out = hoisted(tmp_path / "a")
    assert verify(out).passed
    found = inspect_artifact(out)
    assert found["denoisers"]["transformer"]["stages"] == {
        "prompt": ["encoder_hidden_states"], "timestep": ["timestep"]
    }  # fmt: skip
    assert "invariants-hoisted" in found["facts"]


def test_an_artifact_of_format_1_has_no_stages_and_loads(copy: Path) -> None:
    def older(manifest: dict[str, Any]) -> None:
        manifest["format_version"] = 1
        for record in manifest["denoisers"].values():
            del record["stages"]

    edit(copy, older)
    artifact = turbo_opt.load(copy)
    assert artifact.transformer.stages == {}
    assert artifact.generate("a red circle").shape == (5, 32, 48, 3)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"prompt": ["ghost"]}, "stage 'prompt' names 'ghost', which is no input"),
        ({"step": ["timestep"]}, "stages"),
        ({"prompt": "timestep"}, "stages"),
    ],
)
def test_stages_that_the_graph_cannot_have_are_refused(
    copy: Path, stages: dict[str, Any], message: str
) -> None:
    edit(copy, lambda manifest: manifest["denoisers"]["transformer"].update(stages=stages))
    with pytest.raises(BadInput, match=message):
        turbo_opt.load(copy)


def test_a_wrong_claim_about_an_input_does_not_change_the_result(tmp_path: Path) -> None:
    out = hoisted(tmp_path / "a")
    expected = turbo_opt.load(out).generate("a red circle", seed=1)
    wrong = {"prompt": ["hidden_states", "timestep"], "timestep": ["encoder_hidden_states"]}
    edit(out, lambda manifest: manifest["denoisers"]["transformer"].update(stages=wrong))
    assert (turbo_opt.load(out).generate("a red circle", seed=1) == expected).all()


def test_a_diffusers_pipeline_takes_a_staged_transformer(tmp_path: Path) -> None:
    pipeline = turbo_opt.load(hoisted(tmp_path / "a")).as_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    clip = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3}
    generator = torch.Generator().manual_seed(2)
    frames = pipeline("a red circle", "blue", **clip, generator=generator).frames[0]
    assert frames.shape == (5, 32, 48, 3)
