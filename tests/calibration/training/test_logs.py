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


def test_tensorboard_events_are_written_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = Log(tmp_path, 0, tensorboard=True)
    log.add(1, {"loss": 0.5})
    log.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_missing_tensorboard_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_tensorboard(False)
    with pytest.raises(BadInput, match=r"pip install 'turbo-opt\[train\]'"):
        check_tensorboard(True)
