"""Whose weights a checkpoint has learned from: a copy is the same, other values are not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.training.identity import (
    WEIGHTS,
    check_same_job,
    identity_of,
    weights_identity,
)
from turbo_opt.errors import BadInput

FILE = "diffusion_pytorch_model.safetensors"


def written(folder: Path, **weights: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / FILE, metadata={"format": "pt"})
    return folder


def test_a_copy_that_tells_other_things_of_itself_is_the_same(tmp_path) -> None:
    values = torch.randn(300, 300)
    one = written(tmp_path / "one", w=values)
    shutil.copytree(one, tmp_path / "other")
    save_file({"w": values}, tmp_path / "other" / FILE, metadata={"turbo_opt": "in 3.1 seconds"})
    os.utime(tmp_path / "other" / FILE, (1, 1))
    assert weights_identity(one) == weights_identity(tmp_path / "other")


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 299), st.integers(1, 8))
def test_one_other_value_of_a_small_file_is_noticed(tmp_path_factory, place, size) -> None:
    folder = tmp_path_factory.mktemp("weights")
    values = torch.zeros(300 * size)
    before = weights_identity(written(folder, w=values))
    values[place * size] = 1.0
    assert weights_identity(written(folder, w=values)) != before


def test_values_of_a_large_file_that_were_trained_anew_are_noticed(tmp_path) -> None:
    values = torch.randn(8_000_000)  # 32 MB, of which 4 are looked at
    before = weights_identity(written(tmp_path / "x", w=values))
    assert weights_identity(written(tmp_path / "x", w=values + 1e-6)) != before


def test_the_same_values_under_another_name_are_other_weights(tmp_path) -> None:
    before = weights_identity(written(tmp_path / "x", w=torch.zeros(8)))
    assert weights_identity(written(tmp_path / "x", v=torch.zeros(8))) != before


def test_a_pytorch_file_is_known_by_its_values_not_by_its_time(tmp_path) -> None:
    weights = {"w": torch.randn(30, 30), "b": torch.zeros(())}
    torch.save(weights, tmp_path / "one.pth")
    torch.save(weights, tmp_path / "other.pth")
    os.utime(tmp_path / "other.pth", (1, 1))
    one = weights_identity(tmp_path / "one.pth")
    assert weights_identity(tmp_path / "other.pth") == one
    torch.save({**weights, "w": weights["w"] + 1e-6}, tmp_path / "trained.pth")
    torch.save({**weights, "b": torch.ones(())}, tmp_path / "shifted.pth")
    assert one not in map(weights_identity, (tmp_path / "trained.pth", tmp_path / "shifted.pth"))


def test_other_weights_of_what_is_imitated_are_refused_by_name(home, tmp_path) -> None:
    job = load_job(home / "job.yaml", SLAJob)
    teacher = tmp_path / "transformer"
    shutil.copytree(home / "teacher" / "transformer", teacher)
    folders = {"teacher": teacher, "companions[0]": home / "teacher" / "transformer"}
    theirs = identity_of(job, 8, folders)
    check_same_job(tmp_path, theirs, identity_of(job, 8, folders))
    weights = load_file(teacher / FILE)
    written(teacher, **{name: value + 0.01 for name, value in weights.items()})
    message = r"has learned from other weights than are there now of teacher; put those back"
    with pytest.raises(BadInput, match=message):
        check_same_job(tmp_path, theirs, identity_of(job, 8, folders))


def test_a_checkpoint_that_does_not_say_whose_weights_it_knows_is_taken_over(home) -> None:
    job = load_job(home / "job.yaml", SLAJob)
    ours = identity_of(job, 8, {"teacher": home / "teacher" / "transformer"})
    check_same_job(home, {key: ours[key] for key in ours if key != WEIGHTS}, ours)
    with pytest.raises(BadInput, match=r"data.samples: 8 then, 9 now"):
        check_same_job(home, ours, identity_of(job, 9, {}))
