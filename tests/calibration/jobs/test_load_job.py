"""Jobs: what is wrong with one is said with file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.calibration.conftest import JOB
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.errors import BadInput


def written(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_a_job_knows_its_folder_and_its_defaults(tmp_path: Path) -> None:
    job = load_job(written(tmp_path, JOB), SLAJob)
    assert job.path("samples") == tmp_path / "samples"
    assert job.path("/elsewhere") == Path("/elsewhere")
    assert job.training.compute_dtype == "float32" and job.training.betas == (0.9, 0.98)
    assert SLAJob.model_validate(job.canonical()).canonical() == job.canonical()


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, JOB)
    job = load_job(path, SLAJob, ["training.steps=7", "samples.prompts=[a red circle]"])
    assert job.training.steps == 7 and job.samples is not None
    with pytest.raises(BadInput, match=r"--set training.steps=x: training.steps: must be a valid"):
        load_job(path, SLAJob, ["training.steps=x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("topk: 0.5", "topk: 1.5"), r"job.yaml:5:13: sla.topk: must be less than or equal to 1"),
        (("topk", "top_k"), r"job.yaml:5:7: sla.top_k: unknown key 'top_k', did you mean 'topk'"),
        (("job: sla", "job: slab"), r"job.yaml:2:6: job: 'slab' is not allowed.*'sla'"),
        (("job: sla\n", ""), r"job: required key is missing"),
        (("folder: samples, ", ""), r"data.folder: required key is missing"),
        (("block_q: 64", "block_q: 32"), r"sla.block_q: 32 is not allowed.* 64 or 128"),
        (("rate: 3.0e-4", "betas: [0.9, 1.0]"), r"training.betas\[1\]: must be less than 1"),
        (("schema_version: 1\n", ""), r"schema_version is missing: add 'schema_version: 1'"),
        (("schema_version: 1", "schema_version: 2"), r"2 is not a format that this turbo_opt"),
        (("save:", "noise: {low: 0.5, high: 0.5}\nsave:"), r"noise: low 0.5 must be below high"),
        ((JOB, "- 1\n"), r"job.yaml:1:1: a job is a mapping"),
    ],
)
def test_faults_are_located(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_job(written(tmp_path, JOB.replace(*change)), SLAJob)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.yaml: cannot be read"):
        load_job(tmp_path / "none.yaml", SLAJob)
