"""The first section of docs/training.md, done as it is written, with less of everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks.training_guide.document import LARGER, TITLE, commands, write_files
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.sla2.schema import RouterJob
from turbo_opt.calibration.training.loop import micro_batch
from turbo_opt.calibration.training.world import World
from turbo_opt.cli.main import cli
from turbo_opt.cli.selection import checked_pipeline, select_recipe
from turbo_opt.config.schema import Recipe
from turbo_opt.ir.rcm import SIGMA_MAX, rcm_schedule
from turbo_opt.passes.sparse_attention import SparseAttention, block_sizes
from turbo_opt.targets import get_target


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the guide's YAML files."""
    folder = tmp_path_factory.mktemp("guide")
    assert write_files(TITLE, folder) == ["rcm.yaml", "sla.yaml", "fast.yaml"]
    return folder


@pytest.fixture(scope="module")
def reports(files: Path) -> list[dict[str, Any]]:
    """What each command of the guide reports, after all have run."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        for command in commands(TITLE):
            words = (*command.shorter.words, "--json")
            result = CliRunner().invoke(cli, words, prog_name="turbo-opt")
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


def test_jobs_of_a_learned_choice_of_blocks_fit_together(tmp_path: Path, monkeypatch) -> None:
    section = "A learned choice of blocks: SLA2"
    assert write_files(section, tmp_path) == ["router.yaml", "sla2.yaml"]
    monkeypatch.chdir(tmp_path)
    routed, tuned, run = (command.parsed() for command in commands(section))
    router = load_job(tmp_path / routed["job"], RouterJob, routed["overrides"])
    job = load_job(tmp_path / tuned["job"], SLAJob, tuned["overrides"])
    assert job.student.start == f"{routed['out']}/model"
    recipe = select_recipe(run["recipe"], overrides=run["overrides"])
    options = sparse_options(recipe)
    assert job.sla.mode == options.mode == "sla2"
    assert router.router.topk == job.sla.topk == options.topk
    sizes = (job.sla.block_q, job.sla.block_k)
    assert (router.router.block_q, router.router.block_k) == sizes
    assert block_sizes(options, get_target(recipe.target)) == sizes
    assert recipe.model.source == f"./{tuned['out']}/model"


def test_larger_clips_are_drawn_by_a_recipe_that_is_shipped() -> None:
    data, *_ = commands(LARGER)
    assert data.name == "data" and data.processes == 8
    said = data.parsed()
    recipe = select_recipe(said["recipe"], overrides=said["overrides"])
    assert recipe.model.source == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" and said["captions"]
