"""Jobs from a teacher and samples to a model that the compiler takes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.helpers.tiny_folder import shared_folder
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.run import export, open_parts
from turbo_opt.calibration.jobs.schema import SLAJob, SparseLinear
from turbo_opt.calibration.networks import build_network, open_denoiser
from turbo_opt.calibration.sla.run import solve_sla, train_sla
from turbo_opt.calibration.sla.student import check_start, self_attentions
from turbo_opt.calibration.training.world import World
from turbo_opt.capture.checkpoint import open_checkpoint
from turbo_opt.errors import BadInput, TurboOptError
from turbo_opt.ir.weights import WeightStore

ALONE = World(0, 1, torch.device("cpu"))


def quiet(*told: object) -> None:
    """No progress."""


def job_of(home: Path, *settings: str) -> SLAJob:
    return load_job(home / "job.yaml", SLAJob, settings)


def kept_for_passes(model: Path) -> WeightStore:
    """The weights of a model folder that capture keeps aside for passes."""
    folder = open_denoiser(str(model), "transformer")
    return open_checkpoint(folder.path, {}, {}).unread


@pytest.fixture(scope="module")
def tuned(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job of thirty steps that also draws clips."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    settings = (
        "training.steps=30",
        "training.batch=4",
        "log.evaluate_every=30",
        "samples={every: 30, prompts: [a red circle], num_inference_steps: 2, fps: 8}",
    )
    train_sla(job_of(home, *settings), out, ALONE, progress=quiet)
    return out


def test_tuning_brings_the_student_closer_to_its_teacher(tuned: Path) -> None:
    report = json.loads((tuned / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert after["held_out_loss"] < 0.9 * before["held_out_loss"]
    assert after["held_out_relative_error"] < 0.95 * before["held_out_relative_error"]


def test_clips_are_drawn_on_the_way(tuned: Path) -> None:
    from turbo_opt.runtime.video import read_video

    frames, fps = read_video(tuned / "samples" / "step-000030-0.mp4")
    assert frames.shape == (5, 64, 64, 3) and fps == 8


def test_the_model_has_every_weight_and_says_how_it_was_made(tuned: Path) -> None:
    path = tuned / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, framework="pt") as file:
        names, record = list(file.keys()), json.loads(file.metadata()["turbo_opt"])
        assert file.get_tensor("blocks.1.attn1.proj_l.weight").dtype is torch.float32
        assert file.get_tensor("blocks.1.attn1.to_q.weight").dtype is torch.bfloat16
    assert sum("proj_l" in name for name in names) == 4
    assert record["job"]["sla"]["topk"] == 0.5 and record["report"]["steps"] == 30


def test_the_compiler_finds_the_projections(tuned: Path) -> None:
    assert sorted(kept_for_passes(tuned / "model")) == [
        f"blocks.{i}.attn1.proj_l.{kind}" for i in range(2) for kind in ("bias", "weight")
    ]


def test_a_tuned_model_is_where_the_next_job_starts(home: Path, tuned: Path, tmp_path) -> None:
    report = json.loads((tuned / "report.json").read_text())
    job = job_of(home, f"student.start={tuned / 'model'}", "training.steps=1")
    said: list[str] = []
    again = train_sla(job, tmp_path / "out", ALONE, progress=quiet, say=said.append)
    assert again["before"]["held_out_loss"] == pytest.approx(
        report["after"]["held_out_loss"], rel=0.1
    )
    assert said == []


@pytest.mark.parametrize("settings", [None, SparseLinear(mode="sla2", topk=0.25)])
def test_weights_that_a_student_has_no_place_for_are_said(tuned: Path, settings) -> None:
    said: list[str] = []
    start = open_denoiser(str(tuned / "model"), "transformer")
    with contextlib.suppress(BadInput):  # of SLA2, whose router is missing
        check_start(settings, start, said.append)
    mode = "sla2" if settings else "dense"
    assert f"another attention than this job's ({mode}): " in said[0]
    assert "of its weights are left out, blocks.0.attn1.proj_l" in said[0]


def test_the_second_expert_is_tuned_in_the_folder_of_the_first(home: Path, tmp_path: Path) -> None:
    """The second job's model has both: its own, and a link to the first one's."""
    pair, first, second = shared_folder(2), tmp_path / "high", tmp_path / "low"
    for name, source, out in (
        ("transformer", pair, first),
        ("transformer_2", first / "model", second),
    ):
        settings = (f"teacher={{source: {source}, denoiser: {name}}}", "training.steps=2")
        train_sla(job_of(home, *settings, "save.every=100"), out, ALONE, progress=quiet)
    model = second / "model"
    for name, made in (("transformer", first), ("transformer_2", second)):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (model / file).read_bytes() == (made / "model" / file).read_bytes()
        folder = open_denoiser(str(model), name)
        assert "blocks.0.attn1.proj_l.weight" in open_checkpoint(folder.path, {}, {}).unread


def test_only_the_projections_are_trained_if_asked(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ("sla.trained=proj_l", "export.dtype=float32", "training.compute_dtype=bfloat16")
    train_sla(job_of(home, *settings), out, ALONE, progress=quiet)
    changed = set()
    file = "transformer/diffusion_pytorch_model.safetensors"
    with (
        safe_open(out / "model" / file, framework="pt") as mine,
        safe_open(home / "teacher" / file, framework="pt") as theirs,
    ):
        for name in mine.keys():  # noqa: SIM118
            if "proj_l" in name:
                assert mine.get_tensor(name).any(), name
            elif not torch.equal(mine.get_tensor(name), theirs.get_tensor(name)):
                changed.add(name)
    assert not changed


def test_the_closed_form_reports_every_layer(home: Path, tmp_path: Path) -> None:
    job = job_of(home, "training.average=0.9")  # of which the solution is no part
    report = solve_sla(job, tmp_path / "out", ALONE, progress=quiet)
    start = f"student.start={report['model']}"
    tuned = train_sla(
        job_of(home, start, "training.steps=1"), tmp_path / "tuned", ALONE, progress=quiet
    )
    assert report["after"] == pytest.approx(tuned["before"], rel=1e-2)  # rounded to bfloat16
    assert report["after"] != pytest.approx(report["before"], rel=0.1)
    assert set(report["layers"]) == {"blocks.0.attn1", "blocks.1.attn1"}
    for each in report["layers"].values():
        assert each["error_after"] < 0.98 * each["error_before"]
    assert len(kept_for_passes(Path(report["model"]))) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.folder=elsewhere"], "elsewhere: no such folder of samples"),
        (["teacher.source=./nowhere"], "nowhere: no such folder; a model is"),
        (["teacher.denoiser=transformer_2"], "has no transformer_2, only transformer"),
        (["student.start=nowhere"], "nowhere: no such folder"),
        (["teacher.source=tiny-wan"], "samples have 32 text channels, .* takes 128"),
        (["data.held_out=8"], "none is left to train on"),
        (["student.start=other"], "different architectures: num_layers is 2 and 1"),
        (
            ["teacher.source=two", "samples={prompts: [a circle]}"],
            "has two denoisers, and one alone draws no clips",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    home: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    from tests.helpers.tiny_folder import shared_folder

    folders = {"=other": f"={shared_folder()}", "=two": f"={shared_folder(2)}"}
    for name, folder in folders.items():
        settings = [each.replace(name, folder) for each in settings]
    with pytest.raises(BadInput, match=message):
        train_sla(job_of(home, *settings), tmp_path / "out", ALONE, progress=quiet)
    assert not (tmp_path / "out").exists()


def test_the_closed_form_needs_the_teacher_once_and_leaves_it_as_it_was(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build(folder, *rest):
        built.append((folder.path, network := build_network(folder, *rest)))
        return network

    monkeypatch.setattr("turbo_opt.calibration.sla.run.build_network", build)
    companion = f"companions=[{{source: {home / 'teacher'}}}]"
    job = job_of(home, "closed_form.clips=1", companion, "training.average=0.9")
    moments = []
    adamw = torch.optim.AdamW

    def noted(groups, **options):
        moments.extend(item for group in groups for item in group["params"])
        return adamw(groups, **options)

    monkeypatch.setattr("torch.optim.AdamW", noted)
    report = solve_sla(job, tmp_path / "out", ALONE, progress=quiet)
    assert set(report["before"]) == {"held_out_loss", "held_out_relative_error"}
    assert sum(map(torch.numel, moments)) == 2 * (128 * 128 + 128)  # the projections' alone
    assert [path.parent.name for path, _ in built] == ["teacher", "teacher"]
    processors = [
        {type(attention.processor).__name__ for _, attention in self_attentions(network)}
        for _, network in built
    ]
    assert processors == [{"HeadAttention"}, {"WanAttnProcessor"}]


def test_a_clip_that_cannot_be_shared_is_refused(home: Path, tmp_path: Path) -> None:
    world = World(0, 3, torch.device("cpu"), context_size=3)
    with pytest.raises(BadInput, match="3 processes cannot share 2 heads evenly"):
        train_sla(job_of(home), tmp_path / "out", world, progress=quiet)


def test_a_folder_is_not_used_twice_by_accident(home: Path, tmp_path: Path) -> None:
    job = job_of(home, "training.steps=1")
    train_sla(job, tmp_path / "out", ALONE, progress=quiet)
    with pytest.raises(BadInput, match="holds a job already; --resume continues it"):
        train_sla(job, tmp_path / "out", ALONE, progress=quiet)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(BadInput, match="is no folder of a job"):
        train_sla(job, tmp_path / "mine", ALONE, progress=quiet)


@pytest.mark.parametrize("settings", [(), ("data.held_out=0",), ("training.average=0.9",)])
def test_a_student_that_diverged_is_not_published(home: Path, tmp_path: Path, settings) -> None:
    job = job_of(home, "training.rate=1e20", "training.steps=1", *settings)
    with pytest.raises(TurboOptError, match="not finite after step 1 of 1; no checkpoint") as said:
        train_sla(job, tmp_path / "out", ALONE, progress=quiet)
    assert said.value.exit_code == 1
    assert not {"model", "report.json", "checkpoints"} & {
        item.name for item in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize(
    ("weight", "number", "message"),
    [
        (float("inf"), 1.0, "model: not written, as its weights, or their squares, are not finite"),
        (1.0, float("nan"), r"not written, as a number of its report.json is not finite: .*nan"),
    ],
)
def test_a_model_is_not_written_if_it_or_its_report_is_not_finite(
    home: Path, tmp_path: Path, weight: float, number: float, message: str
) -> None:
    parts, values = open_parts(job_of(home)), {"weight": torch.tensor([weight])}
    with pytest.raises(TurboOptError, match=message):
        export(parts, values, tmp_path, {"after": {"loss": number}}, ALONE)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_tuning_on_a_gpu_uses_its_kernels(home: Path, tmp_path: Path) -> None:
    from turbo_opt.kernels import clear_recorded_choices, recorded_choices

    clear_recorded_choices()
    job = job_of(home, "training.compute_dtype=bfloat16")
    world = World(0, 1, torch.device("cuda", 0))
    report = train_sla(job, tmp_path / "out", world, progress=quiet)
    assert 0 < report["after"]["held_out_loss"] < 1
    for name in ("block_sparse_attention", "block_sparse_attention_backward"):
        assert set(recorded_choices()[name]) == {"triton"}
