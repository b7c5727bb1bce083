"""The log holds each step once, also after a training was stopped and resumed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from turbo_opt.calibration.training.logs import Log, check_tensorboard
from turbo_opt.errors import BadInput


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_new_columns_join_the_rows_that_are_there(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, tensorboard=False)
    log.add(1, {"loss": 0.5})
    log.add(2, {"loss": 0.25, "held_out_loss": 0.5})
    assert rows(tmp_path) == [
        {"step": "1", "loss": "0.5", "held_out_loss": ""},
        {"step": "2", "loss": "0.25", "held_out_loss": "0.5"},
    ]


def test_rows_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        log.add(step, {"loss": step})
    with (tmp_path / "log.csv").open("a") as file:
        file.write("6,")  # cut by a kill
    resumed = Log(tmp_path, 3, tensorboard=False)
    resumed.add(4, {"loss": 0.1})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        ("1", "1"), ("2", "2"), ("3", "3"), ("4", "0.1")
    ]  # fmt: skip


def test_a_training_that_begins_again_has_no_rows_before(tmp_path: Path) -> None:
    for loss in (0.5, 0.25):  # the first one was killed before its first checkpoint
        log = Log(tmp_path, 0, tensorboard=False)
        log.add(0, {"held_out_loss": loss})
    assert rows(tmp_path) == [{"step": "0", "held_out_loss": "0.25"}]


def events(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars("loss")]


def test_tensorboard_shows_each_step_once_too(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, tensorboard=True)
    for step in range(1, 4):
        log.add(step, {"loss": step / 2})
    log.close()
    assert events(tmp_path) == [(1, 0.5), (2, 1.0), (3, 1.5)]
    resumed = Log(tmp_path, 1, tensorboard=True)
    resumed.add(2, {"loss": 0.25})
    resumed.close()
    assert events(tmp_path) == [(1, 0.5), (2, 0.25)]


def test_tensorboard_forgets_a_training_that_begins_again(tmp_path: Path) -> None:
    for loss in (0.5, 0.25):
        log = Log(tmp_path, 0, tensorboard=True)
        log.add(0, {"loss": loss})
        log.close()
    assert events(tmp_path) == [(0, 0.25)]


def test_a_missing_tensorboard_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_tensorboard(False)
    with pytest.raises(BadInput, match=r"pip install 'turbo-opt\[train\]'"):
        check_tensorboard(True)
