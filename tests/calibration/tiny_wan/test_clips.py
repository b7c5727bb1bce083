"""The generator: captions and scenes agree, drawing is deterministic, the split is clean."""

import pytest
import torch

from turbo_opt.calibration.tiny_wan.clips import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    TEMPLATES,
    UNIT_AREA,
    Combination,
    Scene,
    caption,
    captions_of,
    combinations,
    coverage,
    held_out,
    parse_caption,
    render,
    sample_scenes,
)

DEMO = "a red circle moves left to right on a blue background"


def test_the_demo_caption_names_its_scene() -> None:
    what = Combination("circle", "red", "moves left to right", "blue")
    assert caption(what) == DEMO
    assert parse_caption(DEMO) == what


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
def test_every_caption_parses_to_its_combination(template: int) -> None:
    for what in combinations()[::7]:
        assert parse_caption(caption(what, template)) == what


def test_unknown_caption_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match="expected something like 'a red circle"):
        parse_caption("a cat plays the piano")


def test_held_out_combinations_are_never_trained_on() -> None:
    train = {scene.combination for scene in sample_scenes(3000, seed=0, split="train")}
    test = {scene.combination for scene in sample_scenes(600, seed=0, split="held-out")}
    assert not train & test
    assert train | test == set(combinations())
    assert 0.1 < len(test) / len(combinations()) < 0.2
    assert held_out(DEMO)


@pytest.mark.parametrize("count", [1, 229, 512, 1145])
def test_clips_of_one_combination_have_captions_of_their_own(count: int) -> None:
    scenes = sample_scenes(count, seed=0, split="held-out")
    captions = captions_of(scenes)
    assert len(set(captions)) == count
    assert [parse_caption(each) for each in captions] == [each.combination for each in scenes]
    assert captions[0] == caption(scenes[0])


def test_captions_begin_anew_when_the_templates_are_used_up() -> None:
    scenes = [Scene.sample(Combination("ring", "cyan", "grows", "grey"), seed) for seed in range(6)]
    captions = captions_of(scenes)
    assert len(set(captions)) == len(TEMPLATES) and captions[5] == captions[0]


def test_every_value_is_trained_on() -> None:
    train = [each for each in combinations() if not held_out(each)]
    assert {each.shape for each in train} == set(SHAPES)
    assert {each.colour for each in train} == set(COLOURS)
    assert {each.motion for each in train} == set(MOTIONS)
    assert {each.background for each in train} == set(BACKGROUNDS)


def test_drawing_is_deterministic_and_in_range() -> None:
    scenes = sample_scenes(4, seed=3, split="train")
    assert scenes == sample_scenes(4, seed=3, split="train")
    assert scenes != sample_scenes(4, seed=4, split="train")
    video = render(scenes)
    assert video.shape == (4, 3, 17, 96, 96)
    assert torch.equal(video, render(scenes))
    assert torch.equal(video[1:2], render(scenes[1:2]))
    assert video.min() >= -1
    assert video.max() <= 1


def test_motion_goes_where_the_caption_says() -> None:
    scene = Scene("circle", "red", "moves up", "black", size=12, speed=32)
    red = (render([scene])[0, 0] + 1) / 2
    rows = torch.arange(96.0) + 0.5
    height = (red.sum(dim=2) - red[:, :, :1].sum(dim=2) * 96) @ rows
    height = height / (red.sum(dim=2) - red[:, :, :1].sum(dim=2) * 96).sum(dim=1)
    assert height[0] - height[-1] == pytest.approx(32, abs=0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_unit_area_is_the_drawn_area(shape: str) -> None:
    size = torch.tensor(15.0)
    drawn = coverage(shape, torch.tensor(48.0), torch.tensor(48.0), size, 96, 96)
    assert drawn.sum().item() == pytest.approx(UNIT_AREA[shape] * 15**2, rel=0.02)
