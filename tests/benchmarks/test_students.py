"""What `benchmarks.students` compares, and by what measure."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.clip_features import (
    FEATURES,
    accuracy,
    features_of,
    frechet_distance,
    train_classifier,
)
from benchmarks.results import Record
from benchmarks.student_curves import curve, draw
from benchmarks.students.__main__ import _teacher
from benchmarks.students.scorer import Scorer
from benchmarks.students.variants import TEACHER, Variant, better_student, variants
from turbo_opt.calibration.tiny_wan.clips import render, sample_scenes
from turbo_opt.embedded import embedded

CPU = torch.device("cpu")


def test_every_row_has_its_name_and_the_teacher_comes_first() -> None:
    rows = variants()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert rows[0] == Variant(TEACHER, 50, guided=True) and rows[0].evaluations == 100
    assert "merged-topk0.2-int8-block/4-steps" in names
    assert "student-topk0.1-untuned/4-steps" in names


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    place = embedded("tiny-wan-rcm")
    assert place is not None
    return Scorer(place.parent, CPU, count=2, batch=2, classifier_steps=1)


def test_rows_whose_weights_are_not_there_are_left_out(scorer: Scorer) -> None:
    for weights in ("rcm", "sla", "student", "merged", "teacher", "closed-form"):
        assert scorer.lacks(Variant(weights, 4)) is None
    missing = scorer.lacks(Variant("consistency", 4))
    assert missing is not None and missing.name == "consistency.safetensors"
    scorer.student = "consistency"
    assert scorer.lacks(Variant("merged", 4)) == missing
    scorer.student = "rcm"


def test_the_closed_form_is_the_teacher_with_projections_that_are_solved(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("data.held_out=1", "closed_form.clips=1", "closed_form.noise_levels=1")
    monkeypatch.setattr("benchmarks.students.scorer._SAMPLES", 3)
    monkeypatch.setattr("benchmarks.students.scorer._SAID", few)
    solved, teacher = scorer._weights_of("closed-form"), scorer._weights_of("teacher")
    assert solved.keys() == teacher.keys()
    changed = {name for name in solved if not torch.equal(solved[name], teacher[name])}
    assert changed == {name for name in solved if "proj_l" in name}


def test_the_student_is_the_one_that_is_right_more_often() -> None:
    done = {
        Variant(name, steps): {"all_right": 0.9}
        for name in ("rcm", "consistency")
        for steps in (4, 2, 1)
    }
    assert better_student({}) == better_student(done) == "rcm"
    done[Variant("consistency", 1)] = {"all_right": 0.95}
    assert better_student(done) == "consistency"


def test_the_teacher_may_be_of_an_earlier_process_that_judged_alike() -> None:
    name = Variant(TEACHER, 50, guided=True).name
    records = [
        Record(f"h200/{name}", 0.99, "", 0.0, 512, config={"drawn_frechet": 64.0, "steps": 50}),
        Record(f"cpu/{name}", 0.5, "", 0.0, 512, config={"drawn_frechet": 64.0}),
    ]
    assert _teacher({}, records, "h200", {"drawn_frechet": 64.0}) == {"teacher": 0.99}
    assert _teacher({}, records, "h200", {"drawn_frechet": 12.7}) == {}
    now = {Variant(TEACHER, 50, guided=True): {"all_right": 1.0}}
    assert _teacher(now, records, "h200", {"drawn_frechet": 64.0}) == {"teacher": 1.0}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(-3, 3), st.floats(0.5, 2.0), st.integers(2, 6))
def test_the_distance_of_normal_features_is_the_formula(shift, scale, width) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(500, width, generator=generator, dtype=torch.float64)
    other = scale * one + shift
    means = (one.mean(0) - other.mean(0)).square().sum()
    spread = torch.cov(one.mT).trace() * (1 - scale) ** 2
    assert frechet_distance(one, other) == pytest.approx(float(means + spread), abs=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_a_short_training_tells_clips_apart() -> None:
    scenes = sample_scenes(12, seed=1, split="held-out")
    videos = render(scenes)
    network = train_classifier(CPU, steps=16, batch=8)
    assert features_of(network, videos).shape == (12, FEATURES)
    assert accuracy(network, videos, scenes) > 0.25


def test_the_same_classifier_is_trained_every_time_and_no_other_draw_changes() -> None:
    before = torch.get_rng_state()
    videos = render(sample_scenes(2, seed=1, split="held-out"))
    one, other = (features_of(train_classifier(CPU, 2, 2), videos) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_curve_is_what_the_log_says_where_it_says_something(tmp_path: Path) -> None:
    table = (
        "step,loss,held_out_relative_error,held_out_companion_1_relative_error\n"
        "0,,0.5,0.6\n10,0.3,,\n20,0.2,0.25,0.3\n"
    )
    with tarfile.open(tmp_path / "logs.tar", "w") as archive:
        for job in ("sla", "sla-closed-form", "consistency", "rcm", "rcm-sla"):
            (tmp_path / "log.csv").write_text(
                table
                if job.startswith("sla")
                else table.replace("relative_error", "relative_change")
            )
            archive.add(tmp_path / "log.csv", f"{job}/log.csv")
    with tarfile.open(tmp_path / "logs.tar") as archive:
        assert curve(archive, "sla", "held_out_relative_error") == ([0, 20], [0.5, 0.25])
        with pytest.raises(KeyError):
            curve(archive, "none", "loss")
    pytest.importorskip("matplotlib")
    logs = tmp_path / "logs.tar"
    draw(logs, logs, tmp_path / "curves.png", tmp_path / "curves.csv", "abc1234")
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert lines[:3] == [
        "figure,line,step,value,commit",
        "tuning for sparse attention,from proj_l = 0,0,0.5,abc1234",
        "tuning for sparse attention,from proj_l = 0,20,0.25,abc1234",
    ]
    assert 'tuning with the student as companion,"merged, to the student",20,0.3,abc1234' in lines
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
