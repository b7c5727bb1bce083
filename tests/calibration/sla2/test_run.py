"""Both stages of SLA2: routers for a frozen model, then the model around them, then compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.calibration.conftest import JOB, ROUTER_JOB, write_samples
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.networks import open_denoiser
from turbo_opt.calibration.sla.run import solve_sla, train_sla
from turbo_opt.calibration.sla2.run import train_router
from turbo_opt.calibration.sla2.schema import RouterJob
from turbo_opt.calibration.training.loop import Trainer
from turbo_opt.calibration.training.world import World
from turbo_opt.capture.checkpoint import open_checkpoint
from turbo_opt.cli.main import cli
from turbo_opt.errors import BadInput

ALONE = World(0, 1, torch.device("cpu"))
FILE = "transformer/diffusion_pytorch_model.safetensors"
SLA2_JOB = JOB.replace("sla: {", "sla: {mode: sla2, ")


def quiet(*told: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def place(home: Path) -> Path:
    (home / "router.yaml").write_text(ROUTER_JOB)
    (home / "sla2.yaml").write_text(SLA2_JOB)
    return home


def router_job(place: Path, *settings: str) -> RouterJob:
    return load_job(place / "router.yaml", RouterJob, settings)


def sla2_job(place: Path, routed: Path, *settings: str) -> SLAJob:
    return load_job(place / "sla2.yaml", SLAJob, (f"student.start={routed / 'model'}", *settings))


@pytest.fixture(scope="module")
def routed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job of stage 1."""
    out = tmp_path_factory.mktemp("routed") / "out"
    train_router(router_job(place), out, ALONE, progress=quiet)
    return out


def test_the_model_is_the_teacher_with_routers_in_float32(place: Path, routed: Path) -> None:
    mine, theirs = (load_file(path / FILE) for path in (routed / "model", place / "teacher"))
    added = sorted(mine.keys() - theirs.keys())
    assert theirs.keys() <= mine.keys() and len(added) == 8
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert mine["blocks.1.attn1.alpha.weight"].shape == (2, 128)
    assert not torch.equal(mine["blocks.1.attn1.router.proj_q.weight"], torch.eye(128))
    stored = open_checkpoint(open_denoiser(str(routed / "model"), "transformer").path, {}, {})
    assert sorted(stored.unread) == added


def test_routers_stay_in_float32_beside_a_model_in_bfloat16(place: Path, tmp_path: Path) -> None:
    job = router_job(place, "export.dtype=bfloat16", "training.steps=1")
    train_router(job, tmp_path / "out", ALONE, progress=quiet)
    with safe_open(tmp_path / "out" / "model" / FILE, framework="pt") as file:
        assert file.get_tensor("blocks.0.attn1.alpha.bias").dtype is torch.float32
        assert file.get_tensor("blocks.0.attn1.to_q.weight").dtype is torch.bfloat16


class Stopped(Exception):
    """What a kill is here."""


def test_a_stopped_job_ends_with_the_bits_of_one_that_was_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, real = router_job(place), Trainer._train_step
    train_router(job, tmp_path / "a", ALONE, progress=quiet)

    def until(trainer: Trainer, rate: float) -> dict[str, float]:
        if trainer.step == 4:
            raise Stopped
        return real(trainer, rate)

    monkeypatch.setattr(Trainer, "_train_step", until)
    with pytest.raises(Stopped):
        train_router(job, tmp_path / "b", ALONE, progress=quiet)
    monkeypatch.undo()
    report = train_router(job, tmp_path / "b", ALONE, resume=True, progress=quiet)
    assert (report["first_step"], report["steps"]) == (3, 6)
    expected, found = (load_file(tmp_path / name / "model" / FILE) for name in "ab")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.fixture(scope="module")
def structured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jobs for tiny-wan, whose attention has something to route, on 320 tokens of random clips."""
    folder = tmp_path_factory.mktemp("structured")
    write_samples(folder / "samples", 6, frames=5, text_dim=128)
    tiny = ("./teacher", "tiny-wan"), ("topk: 0.5", "topk: 0.4")
    for name, text in (("router", ROUTER_JOB), ("sla2", SLA2_JOB)):
        for before, after in tiny:
            text = text.replace(before, after)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def learned(structured: Path) -> dict[str, dict[str, float]]:
    """The report of stage 1."""
    job = router_job(structured, "training.steps=12", "training.rate=3.0e-3")
    return train_router(job, structured / "routed", ALONE, progress=quiet)


def test_stage_1_brings_attention_closer_to_dense_attention(learned) -> None:
    before, after = learned["before"], learned["after"]
    assert learned["job"] == "router"
    assert after["held_out_relative_error"] < 0.85 * before["held_out_relative_error"]
    assert after["held_out_sparse_error"] < 0.95 * before["held_out_sparse_error"]
    assert after["held_out_loss"] == pytest.approx(after["held_out_relative_error"] ** 2, rel=0.1)


def test_straight_through_choices_learn_as_well(structured: Path, tmp_path: Path) -> None:
    settings = ("training.steps=6", "training.rate=3.0e-3", "router.choice=straight-through")
    job = router_job(structured, *settings)
    report = train_router(job, tmp_path / "out", ALONE, progress=quiet)
    before, after = (report[when]["held_out_relative_error"] for when in ("before", "after"))
    assert after < 0.95 * before


def test_stage_2_tunes_all_but_the_router(structured: Path, learned) -> None:
    settings = ("training.steps=8", "training.rate=2.0e-5", "export.dtype=float32")
    job = sla2_job(structured, structured / "routed", *settings, "sla.quantized=true")
    report = train_sla(job, structured / "tuned", ALONE, progress=quiet)
    assert report["after"]["held_out_loss"] < 0.97 * report["before"]["held_out_loss"]
    before, after = (load_file(structured / name / "model" / FILE) for name in ("routed", "tuned"))
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    routers = {name for name in before if ".router." in name}
    assert len(routers) == 8 and routers <= same
    assert not any(".alpha." in name or "attn1.to_q" in name for name in same)


def test_the_compiled_model_predicts_what_the_student_did(
    place: Path, routed: Path, tmp_path: Path
) -> None:
    """From the artifact of `run`, and from the student in training."""
    import turbo_opt
    from turbo_opt.calibration.flow import Denoiser
    from turbo_opt.calibration.networks import build_network
    from turbo_opt.calibration.sla.student import make_sparse

    (tmp_path / "recipe.yaml").write_text(
        "schema_version: 1\n"
        f"model: {{source: {routed / 'model'}, dtype: float32}}\n"
        "target: cpu\n"
        "passes:\n- canonicalize\n"
        "- sparse-attention: {mode: sla2, qk: 16bit, topk: 0.5, block_q: 64, block_k: 64}\n"
    )
    result = invoke("run", tmp_path / "recipe.yaml", "--out", tmp_path / "artifact")
    assert result.exit_code == 0, result.output
    torch.manual_seed(0)
    x, t, text = torch.randn(1, 16, 2, 16, 16), torch.tensor([600.0]), torch.randn(1, 16, 32)
    compiled = turbo_opt.load(tmp_path / "artifact").transformer
    folder = open_denoiser(str(routed / "model"), "transformer")
    settings = sla2_job(place, routed).sla
    student = build_network(folder, ALONE, lambda network: make_sparse(network, settings))
    with torch.no_grad():
        expected = Denoiser(student, folder)(x, t / 1000, text)
        found = compiled(x, t, text).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_student_without_router_is_refused_before_anything_is_written(
    place: Path, routed: Path, tmp_path: Path
) -> None:
    for start, message in (
        ([], "teacher/transformer has no blocks.0.attn1.router.proj_q.weight and 7 more"),
        ([f"student.start={tmp_path / 'model'}"], "has no blocks.1.attn1.alpha.bias; sla.mode"),
    ):
        if start:
            _without(routed / "model", tmp_path / "model", "blocks.1.attn1.alpha.bias")
        job = load_job(place / "sla2.yaml", SLAJob, start)
        with pytest.raises(BadInput, match=message) as error:
            train_sla(job, tmp_path / "out", ALONE, progress=quiet)
        assert "`turbo-opt calibrate router` writes" in str(error.value)
        assert not (tmp_path / "out").exists()


def _without(model: Path, out: Path, name: str) -> None:
    (out / "transformer").mkdir(parents=True)
    for part in ("model_index.json", "transformer/config.json"):
        (out / part).write_bytes((model / part).read_bytes())
    weights = load_file(model / FILE)
    del weights[name]
    save_file(weights, out / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["router.topk=7"], "router.topk: must be"),
        (["router.temperature=0"], "router.temperature: must be"),
        (["router.tempreature=1"], "did you mean 'temperature'"),
        (["router.quantized=true"], "quantized"),
        (["router.choice=hard"], "router.choice: 'hard' is not allowed"),
        (["training.context_parallel=2"], "training.context_parallel"),
        (["samples={prompts: [a red circle]}"], "samples"),
    ],
)
def test_faults_of_a_job_are_named(place: Path, settings: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        router_job(place, *settings)


def test_sla2_has_no_proj_l(place: Path, routed: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="mode 'sla2' has no proj_l to train: set trained to 'all'"):
        sla2_job(place, routed, "sla.trained=proj_l")
    with pytest.raises(BadInput, match=r"closed-form solves proj_l, which sla.mode 'sla2' does"):
        solve_sla(sla2_job(place, routed), tmp_path / "out", ALONE, progress=quiet)
    assert not (tmp_path / "out").exists()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(item) for item in arguments], prog_name="turbo-opt")


def test_from_the_command_line(place: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", "router", place / "router.yaml", "--device", "cpu")
    arguments += ("--out", tmp_path / "out")
    first = invoke(*arguments, "--set", "training.steps=3")
    assert first.exit_code == 0, first.output
    assert "sparse error" in first.stdout and "relative error" in first.stdout
    again = invoke(*arguments)
    assert again.exit_code == 2 and "--resume continues it" in again.stderr
    other = invoke(*arguments, "--resume", "--set", "router.topk=0.25")
    assert other.exit_code == 2 and "router.topk: 0.5 then, 0.25 now" in other.stderr
    resumed = invoke(*arguments, "--resume", "--json")
    assert json.loads(resumed.stdout)["first_step"] == 3


@pytest.mark.gpu
def test_both_stages_on_a_gpu_use_its_kernels(place: Path, tmp_path: Path) -> None:
    from turbo_opt.kernels import clear_recorded_choices, recorded_choices

    world = World(0, 1, torch.device("cuda", 0))
    in_bfloat16 = "training.compute_dtype=bfloat16"
    train_router(router_job(place, in_bfloat16), tmp_path / "routed", world, progress=quiet)
    clear_recorded_choices()
    job = sla2_job(place, tmp_path / "routed", in_bfloat16, "sla.quantized=true")
    report = train_sla(job, tmp_path / "out", world, progress=quiet)
    assert 0 < report["after"]["held_out_loss"] < 1
    for name in ("block_sparse_attention", "block_sparse_attention_backward", "block_routing"):
        assert set(recorded_choices()[name]) == {"triton"}
    assert "reference" not in recorded_choices()["sage_sparse_attention"]


def test_a_job_that_may_not_resume_another_leaves_its_file(place: Path, tmp_path: Path) -> None:
    sla = load_job(place / "job.yaml", SLAJob, ["training.steps=3"])
    train_sla(sla, tmp_path / "out", ALONE, progress=quiet)
    said = (tmp_path / "out" / "job.json").read_text()
    with pytest.raises(BadInput, match="another job"):
        train_router(router_job(place), tmp_path / "out", ALONE, resume=True, progress=quiet)
    assert (tmp_path / "out" / "job.json").read_text() == said
    longer = load_job(place / "job.yaml", SLAJob, ["training.steps=4"])
    train_sla(longer, tmp_path / "out", ALONE, resume=True, progress=quiet)
    assert json.loads((tmp_path / "out" / "job.json").read_text())["training"]["steps"] == 4
