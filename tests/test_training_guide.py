"""The first section of docs/training.md, done as it is written, with less of everything."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.training.loop import micro_batch
from turbo_opt.calibration.training.world import World
from turbo_opt.cli.main import cli
from turbo_opt.cli.selection import checked_pipeline, select_recipe
from turbo_opt.config.schema import Recipe
from turbo_opt.ir.rcm import SIGMA_MAX, rcm_schedule
from turbo_opt.passes.sparse_attention import SparseAttention, block_sizes
from turbo_opt.targets import get_target

GUIDE = Path(__file__).parents[1] / "docs" / "training.md"
TITLE, LARGER = "From a teacher to a four-step sparse student", "Wan2.1 1.3B, on several GPUs"
RECORD = """
say() { printf '%s\\0' "$@"; echo; }
turbo-opt() { say 1 "$@"; }
torchrun() { [ "$1 $3 $4" = "--nproc-per-node -m turbo_opt" ] && say "$2" "${@:5}"; }
"""
"""Has a shell say what it would run: the number of processes, then the arguments."""

SIZE = ("generate.height=32", "generate.width=32", "generate.num_frames=5")
TRAINING = (
    *("training.steps=5", "training.minutes=null", "training.batch=2", "data.held_out=1"),
    "training.compile=false",
)
CUTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "data": (("--count", "4", "--device", "cpu"), (*SIZE, "generate.num_inference_steps=1")),
    "rcm": (("--device", "cpu"), TRAINING),
    "sla": (("--device", "cpu"), TRAINING),
    "run": (("--no-cache", "--no-verify"), SIZE),
    "generate": (("--device", "cpu"), ()),
}
"""Command → options and settings of less work."""


@dataclass(frozen=True)
class Command:
    """A command line of the guide.

    Attributes:
        processes: that run it.
        words: the arguments of `turbo-opt`.
    """

    processes: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.words[1] if self.words[0] == "calibrate" else self.words[0]

    @property
    def shorter(self) -> tuple[str, ...]:
        """The arguments, with those that cut it down."""
        options, settings = CUTS[self.name]
        said = [word for setting in settings for word in ("--set", setting)]
        return (*self.words, *options, *said, "--json")

    def parsed(self) -> dict[str, Any]:
        """What the command itself makes of its arguments."""
        words, command = list(self.words), cli
        while isinstance(command, click.Group):
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None, self.words
            command = found
        return command.make_context(self.name, words).params


def section(title: str) -> str:
    """A section's text, up to the next heading."""
    found = re.search(rf"^##+ {re.escape(title)}$(.*?)^##", GUIDE.read_text(), re.M | re.S)
    assert found is not None, title
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(title: str) -> list[Command]:
    """The command lines of a section's shell block, as a shell reads them."""
    (script,) = blocks(section(title), "sh")
    said = subprocess.run(
        ["bash", "-euc", RECORD + script], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split("\0")[:-1] for line in said.splitlines()]
    return [Command(int(count), tuple(words)) for count, *words in lines]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the guide's YAML files."""
    folder = tmp_path_factory.mktemp("guide")
    for text in blocks(section(TITLE), "yaml"):
        name = re.match(r"# (\w+\.yaml)\n", text)
        assert name is not None, text
        (folder / name[1]).write_text(text)
    return folder


@pytest.fixture(scope="module")
def reports(files: Path) -> list[dict[str, Any]]:
    """What each command of the guide reports, after all have run."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        for command in commands(TITLE):
            result = CliRunner().invoke(cli, command.shorter, prog_name="turbo-opt")
            assert result.exit_code == 0, (command.words, result.stderr)
            found.append(json.loads(result.stdout))
    return found


def test_the_guide_leads_from_the_teacher_to_a_clip(reports, files: Path) -> None:
    names = [command.name for command in commands(TITLE)]
    assert names == ["data", "rcm", "rcm", "sla", "run", "generate"]
    matches = {record["name"]: record["matches"] for record in reports[4]["passes"]}
    assert matches["sparse-attention"] == 4
    assert matches["merge-weights"] == matches["distill-steps"] + 8  # proj_l of four layers
    clip = reports[5]
    assert (clip["evaluations"], clip["frames"]) == (4, 5)
    assert (files / clip["clip"]).stat().st_size > 0


def test_every_job_trains_its_student(reports) -> None:
    for report in reports[1:4]:
        assert report["steps"] == 5
        assert report["before"]["held_out_loss"] != report["after"]["held_out_loss"]
    assert "held_out_companion_1_loss" in reports[3]["after"]


def test_a_companion_learns_at_the_noise_levels_of_four_steps(files: Path) -> None:
    (companion,) = load_job(files / "sla.yaml", SLAJob).companions
    lowest = min(step.time for step in rcm_schedule(4, SIGMA_MAX, "sde").steps)
    assert 0.9 * lowest < companion.noise.low < lowest


@pytest.mark.parametrize("title", [TITLE, LARGER])
def test_the_recipe_takes_what_the_jobs_have_made(title, files: Path, monkeypatch) -> None:
    monkeypatch.chdir(files)
    *_, distilled, tuned, run, _ = (command.parsed() for command in commands(title))
    job = load_job(files / tuned["job"], SLAJob, tuned["overrides"])
    recipe = select_recipe(run["recipe"], overrides=run["overrides"])
    checked_pipeline(recipe)
    assert job.companions[0].source == f"{distilled['out']}/model"
    for name, made in (("student", distilled), ("sla", tuned)):
        assert (files / recipe.weights[name]) == files / made["out"] / "model"
    assert recipe.weights["base"] == recipe.model.source == job.teacher.source
    options = sparse_options(recipe)
    assert options.topk == job.sla.topk
    assert block_sizes(options, get_target(recipe.target)) == (job.sla.block_q, job.sla.block_k)


def sparse_options(recipe: Recipe) -> SparseAttention.Options:
    (options,) = (s.options for s in recipe.specs() if s.name == SparseAttention.name)
    return SparseAttention.Options.model_validate(options)


@pytest.mark.parametrize("context_parallel", [1, 2, 4])
@pytest.mark.parametrize("processes", [1, 4, 8])
def test_the_same_jobs_are_valid_for_a_larger_model_on_several_gpus(
    files: Path, processes: int, context_parallel: int
) -> None:
    kinds = {"rcm": RCMJob, "sla": SLAJob}
    trainings = [command for command in commands(LARGER) if command.name in kinds]
    assert [command.name for command in trainings] == ["rcm", "sla"]
    for command in trainings:
        said = command.parsed()
        overrides = (*said["overrides"], f"training.context_parallel={context_parallel}")
        job = load_job(files / said["job"], kinds[command.name], overrides)
        assert job.teacher.source == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        assert job.training.minutes is None and not job.data.resident
        size = max(processes, context_parallel)
        world = World(0, size, torch.device("cpu"), context_size=context_parallel)
        assert micro_batch(job, world) == 1


def test_larger_clips_are_drawn_by_a_recipe_that_is_shipped() -> None:
    data, *_ = commands(LARGER)
    assert data.name == "data" and data.processes == 8
    said = data.parsed()
    recipe = select_recipe(said["recipe"], overrides=said["overrides"])
    assert recipe.model.source == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" and said["captions"]
