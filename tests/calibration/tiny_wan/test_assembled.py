"""The assembled folder is a complete pipeline that WanPipeline loads, and the stages chain up."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer

from turbo_opt.calibration.tiny_wan.architecture import (
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from turbo_opt.calibration.tiny_wan.assemble import assemble
from turbo_opt.calibration.tiny_wan.clips import SIZE
from turbo_opt.calibration.tiny_wan.evaluate import (
    Evaluation,
    evaluate,
    load_pipeline,
    starting_noise,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assembled pipeline of untrained parts."""
    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("tiny-wan")
    build_vae().save_pretrained(work / "vae")
    build_transformer().save_pretrained(work / "transformer")
    build_text_encoder(len(build_tokenizer())).save_pretrained(work / "text_encoder")
    sizes = assemble(work, work / "tiny_wan")
    assert sum(sizes.values()) < 12
    return work / "tiny_wan"


def test_pipeline_loads_and_draws_a_video(folder: Path) -> None:
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a red circle moves up on a blue background",
        height=SIZE,
        width=SIZE,
        num_frames=17,
        num_inference_steps=1,
    ).frames
    assert frames.shape == (1, 17, SIZE, SIZE, 3)


def test_tokenizer_loads_by_itself(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = "an orange ring shrinks on a grey background"
    assert tokenizer(text).input_ids == build_tokenizer()(text).input_ids
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


def test_folder_names_no_other_folder(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text()


def test_evaluation_scores_untrained_parts_as_wrong(folder: Path, tmp_path: Path) -> None:
    settings = Evaluation(prompts=2, steps=1, guidance_scale=1.0, vae_clips=2)
    report = evaluate(load_pipeline(folder, torch.device("cpu")), settings, tmp_path / "sheet.png")
    assert report["passed"] is False
    assert json.loads(json.dumps(report))["accuracy"]["shape"] == 0
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_starting_noise_does_not_depend_on_the_count() -> None:
    assert torch.equal(starting_noise(3, seed=5)[:2], starting_noise(2, seed=5))
