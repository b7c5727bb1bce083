"""The training guide in several calls: what is stopped, what goes on, and how it is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.results import Record, write
from benchmarks.tables import cells
from benchmarks.tables.training import guide
from benchmarks.training_guide import document, larger
from benchmarks.training_guide.document import LARGER, TITLE, Command, commands, write_files
from benchmarks.training_guide.parts import (
    AROUND_TRAINING,
    PARTS,
    Parts,
    launcher,
    least_seconds,
)
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.cli.selection import select_recipe

DATA = Command(1, ("calibrate", "data", "--out", "clips"))
TRAINING = Command(1, ("calibrate", "rcm", "rcm.yaml", "--out", "student"))
LAST = Command(1, ("generate", "fast", "--prompt", "x", "--out", "clip.mp4"))
MEANS = [(1, 50.0, 1.5), (2, 30.0, 2.5), (3, 21.0, 2.5), (4, 16.5, 2.0)]
"""Rows of a log: steps that take 50, 10, 3 and 3 seconds."""
PROGRAM = """
import pathlib, sys, time
words = sys.argv[1:]
with open("said.txt", "a") as file:
    print(*words, file=file)
if "rcm" in words:
    pathlib.Path("student").mkdir(exist_ok=True)
    pathlib.Path("student/job.json").write_text("{}")
    if "--resume" not in words:
        time.sleep(60)
if words[0] == "generate":
    sys.exit("no such artifact" if not pathlib.Path("artifact").exists() else 0)
"""
"""Stands for turbo-opt: a training does not end unless it is resumed."""


def parts(folder: Path, *said: Command, least: float = 0.0) -> Parts:
    program = [sys.executable, "-c", PROGRAM]
    least_of = lambda command, _: least if command.trains else 0.0  # noqa: E731
    return Parts(folder, said, lambda processes: program, least_of)


def said_in(folder: Path) -> list[str]:
    return [line.removeprefix("calibrate ") for line in (folder / "said.txt").open()]


def test_a_training_over_budget_is_stopped_and_resumed_and_nothing_runs_twice(tmp_path) -> None:
    first = parts(tmp_path, DATA, TRAINING, DATA)
    assert not first.run(budget=3.0)
    assert [(part.number, part.code) for part in first.done] == [(1, 0), (2, None)]
    again = parts(tmp_path, DATA, TRAINING, DATA)
    assert again.run(budget=60.0)
    assert [(part.number, part.code) for part in again.done[2:]] == [(2, 0), (3, 0)]
    assert said_in(tmp_path) == [
        "data --out clips\n",
        "rcm rcm.yaml --out student\n",
        "rcm rcm.yaml --out student --resume\n",
        "data --out clips\n",
    ]
    stopped, ended = (part.seconds for part in again.done if part.number == 2)
    assert again.minutes()[1] == pytest.approx((stopped + ended) / 60)
    assert 1.0 < stopped < 20 and sum(again.minutes()) > again.minutes()[1]


def test_what_does_not_fit_waits_for_the_next_call_unless_no_call_is_long_enough(tmp_path) -> None:
    waiting = parts(tmp_path, DATA, TRAINING, least=59.99)
    assert not waiting.run(budget=60.0)
    assert [part.number for part in waiting.done] == [1]
    too_long = parts(tmp_path, DATA, TRAINING, least=100.0)
    assert not too_long.run(budget=3.0)
    assert [part.code for part in too_long.done] == [0, None]


def test_a_command_that_fails_is_named_with_its_last_words_and_runs_again(tmp_path) -> None:
    with pytest.raises(SystemExit, match="command 2 failed:\nno such artifact"):
        parts(tmp_path, DATA, LAST).run()
    (tmp_path / "artifact").touch()
    again = parts(tmp_path, DATA, LAST)
    assert again.run()
    assert [part.code for part in again.done] == [0, 1, 0]


def test_a_folder_of_other_commands_is_refused(tmp_path) -> None:
    parts(tmp_path, DATA).run()
    with pytest.raises(SystemExit, match=rf"{PARTS}: is of other commands"):
        parts(tmp_path, DATA, LAST)


def test_a_training_needs_the_minutes_that_its_file_says(tmp_path) -> None:
    write_files(TITLE, tmp_path)
    least = [least_seconds(command, tmp_path) for command in commands(TITLE)]
    assert least == [0, *(60 * minutes + AROUND_TRAINING for minutes in (3, 3, 7)), 0, 0]
    assert max(least) < 600  # a call of ten minutes holds each of them
    cut = [least_seconds(command.shorter, tmp_path) for command in commands(TITLE)]
    assert not any(cut)


def test_a_guide_without_the_section_or_with_a_nameless_file_is_an_error(
    tmp_path, monkeypatch
) -> None:
    with pytest.raises(ValueError, match="has no section 'Other'"):
        commands("Other")
    monkeypatch.setattr(document, "GUIDE", tmp_path / "guide.md")
    document.GUIDE.write_text("# A\n\n## B\n\n```yaml\nx: 1\n```\n\n## C\n")
    with pytest.raises(ValueError, match="does not begin with its file's name"):
        write_files("B", tmp_path)


def test_the_larger_models_commands_are_cut_to_the_gpus_that_are_there(tmp_path: Path) -> None:
    write_files(TITLE, tmp_path)
    teacher = tmp_path / "teacher"
    said = [larger.cut(command, 2, 6, teacher, tiny=False) for command in commands(LARGER)]
    assert [command.name for command in said] == ["data", "rcm", "sla", "run", "generate"]
    assert [command.processes for command in said] == [2, 2, 2, 1, 1]
    _, distilled, tuned, run, _ = (command.parsed() for command in said)
    rcm = load_job(tmp_path / distilled["job"], RCMJob, distilled["overrides"])
    assert (rcm.training.steps, rcm.training.batch, rcm.rcm.warm_up) == (6, 2, 3)
    sla = load_job(tmp_path / tuned["job"], SLAJob, tuned["overrides"])
    assert (sla.training.steps, sla.sla.topk, sla.training.compile) == (6, 0.1, True)
    assert sla.teacher.source == rcm.teacher.source == str(teacher)
    recipe = select_recipe(run["recipe"], overrides=run["overrides"])
    assert recipe.model.source == recipe.weights["base"] == str(teacher)


def test_several_processes_are_torchruns() -> None:
    assert launcher(1) == [sys.executable, "-m", "turbo_opt"]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert launcher(3) == [*several, "--nproc-per-node=3", "-m", "turbo_opt"]


def test_what_a_record_keeps_of_a_training(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"steps": 4, "before": {}, "after": {"x": 1.0}}')
    rows = "".join(f"{step},{mean},{peak}\n" for step, mean, peak in MEANS)
    (tmp_path / "log.csv").write_text("step,seconds_per_step,peak_gib\n" + rows)
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000004" / "__0_0.distcp").write_bytes(bytes(2_000_000))
    found = larger.told(tmp_path)
    assert (found["steps"], found["after"], found["peak_gib"]) == (4, {"x": 1.0}, 2.5)
    assert found["median_seconds_per_step"] == pytest.approx(3.0)  # of the last two
    assert found["checkpoints_gb"] == pytest.approx(2e-3)


@pytest.mark.parametrize("words", [("--gpus", "1"), ("--gpus", "2", "--steps", "2")])
def test_too_few_gpus_or_steps_are_refused(tmp_path: Path, capsys, words) -> None:
    with pytest.raises(SystemExit, match="2"):
        larger.main([*words, "--work", str(tmp_path / "work")])
    assert "--steps: at least 3" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_the_table_has_what_was_measured(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    record = Record(
        "h200/tiny-wan/training_guide_minutes", 17.04, "minutes", 0.0, 1,
        quality={"all_right": 0.998},
        config={"minutes": [1.52, 3.5, 3.5, 8.02, 0.3, 0.2], "captions": 512},
    )  # fmt: skip
    write(tmp_path / "training_guide.json", [record])
    minutes = [line.split("|")[2].strip() for line in guide().splitlines()[2:]]
    assert minutes == ["1.5", "3.5", "3.5", "8.0", "0.5", "17.0"]
    assert "99.8 % of 512 held-out clips" in guide()
