"""The recipe tiny-wan/cpu-turbo: the shipped student of four steps, made sparse, in 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import turbo_opt
from turbo_opt.artifact.load import load
from turbo_opt.calibration.tiny_wan.clips import parse_caption
from turbo_opt.calibration.tiny_wan.detectors import score
from turbo_opt.checkpoints.places import locate
from turbo_opt.embedded import embedded
from turbo_opt.errors import BadInput

PROMPTS = (
    "a red circle moves left to right on a blue background",
    "a yellow ring stays still on a black background",
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory):
    recipe = turbo_opt.load_recipe("tiny-wan/cpu-turbo", ["verify.mode=sample"])
    built = turbo_opt.build(recipe)
    out = tmp_path_factory.mktemp("turbo") / "artifact"
    turbo_opt.save(built.optimized, out, recipe=recipe.canonical(), target=recipe.target)
    return load(out)


def test_a_hundred_evaluations_become_four(artifact) -> None:
    captured = turbo_opt.load_recipe("tiny-wan/cpu").generate
    assert 2 * captured.num_inference_steps == 100
    assert artifact.schedule.evaluations == 4
    assert {step.guidance_scale for step in artifact.schedule.steps} == {None}


def test_every_self_attention_is_sparse_with_a_projection_that_was_learned(artifact) -> None:
    passes = {entry["name"]: entry for entry in artifact.manifest.history}
    assert passes["sparse-attention"]["matches"] == 4
    assert passes["merge-weights"]["matches"] == 131


@pytest.mark.parametrize("prompt", PROMPTS)
def test_its_clips_show_what_the_prompt_says(artifact, prompt: str) -> None:
    frames = torch.from_numpy(artifact.generate(prompt, seed=0)).movedim(-1, 0)
    assert all(score(frames.float() / 127.5 - 1, parse_caption(prompt)).values())


def test_the_model_and_its_students_are_small() -> None:
    models = embedded("tiny-wan").parent
    assert sum(file.stat().st_size for file in models.rglob("*") if file.is_file()) < 30 * 2**20


@pytest.mark.parametrize("name", ["tiny-wan-rcm", "tiny-wan-sla"])
def test_students_inside_the_package_are_named_like_models(name) -> None:
    place = embedded(name)
    assert place is not None and place.stat().st_size < 16 * 2**20
    assert locate(name, ["transformer"], {}) == {"transformer": place}


def test_a_folder_of_a_students_name_does_not_take_its_place(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tiny-wan-rcm").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = turbo_opt.load_recipe("tiny-wan/cpu-turbo")
    assert recipe.checkpoints()["student"] == "tiny-wan-rcm"
    assert locate("student", ["transformer"], recipe.checkpoints())["transformer"].is_file()


def test_what_the_package_lacks_is_bad_input() -> None:
    assert embedded("tiny-wan-none") is None
    with pytest.raises(BadInput, match="no weights 'tiny-wan-none'"):
        locate("tiny-wan-none", ["transformer"], {})
