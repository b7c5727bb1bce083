"""The benchmark of training: what a log's steps make, and when the rate beside them is measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training
from benchmarks.forward import CASES
from benchmarks.kernels._harness import Session
from benchmarks.results import Ceiling, read
from tests.calibration.conftest import write_teacher
from tests.calibration.rcm.test_objective import batch, objective
from turbo_opt.calibration.jobs.run import Parts
from turbo_opt.calibration.networks import open_denoiser
from turbo_opt.calibration.rcm.run import _objective
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.training.world import World

RATE = Ceiling(500.0, "TFLOP/s", "bf16 library matmul 8192³")


def log(seconds: list[float]) -> list[dict[str, str]]:
    """Rows of steps that took so long: a log holds means since the start."""
    means = [sum(seconds[:step]) / step for step in range(1, len(seconds) + 1)]
    return [
        {"step": str(step), "seconds_per_step": repr(mean), "peak_gib": str(step / 2)}
        for step, mean in enumerate(means, 1)
    ]


def speed(name: str, seconds: list[float], gpus: int = 1, **how: Any):
    case, session, setup = CASES["1.3b"], Session(dry=True), training.Setup(gpus, **how)
    return training.speed_record(case, name, setup, log(seconds), RATE, session)


def test_the_first_two_steps_do_not_count_and_the_median_is_taken() -> None:
    record = speed("sla", [50.0, 50.0, 2.0, 4.0, 1.0])
    assert record.value == pytest.approx(32_760 / 2)
    assert (record.runs, record.config["peak_gib"]) == (3, 2.5)
    assert record.name.endswith("/calibrate-sla/1-gpus/tokens_per_s")
    record = speed("sla", [1.0] * 4, compile=True)
    assert record.name.endswith("/calibrate-sla-compiled/1-gpus/tokens_per_s")
    assert record.config["job"]["compile"]


@pytest.mark.parametrize(
    ("name", "topk", "tangent"),
    [("rcm", 0.1, "difference"), ("rcm-dense", None, "difference"), ("rcm-jvp", None, "jvp")],
)
def test_students_of_rcm_are_sparse_or_dense(name: str, topk: float | None, tangent: str) -> None:
    said = training.job(name, training.Setup(1), Path())
    assert said["job"] == "rcm" and said["rcm"]["forward"]["tangent"] == tangent
    assert said.get("sla", {}).get("topk") == topk
    record = speed(name, [*[1.0] * 5, *[2.0] * 5])
    assert (record.runs, record.value) == (1, pytest.approx(32_760 / 2))
    assert record.config["topk"] == topk
    sparse, dense = (training.operations(CASES["1.3b"], each) for each in ("rcm", "rcm-dense"))
    assert training.operations(CASES["1.3b"], name) == (sparse if topk else dense)
    assert sparse < dense


@pytest.mark.parametrize("tangent", ["difference", "jvp"])
def test_forwards_are_those_that_the_objective_runs(tangent: str) -> None:
    """Over all lengths of rollouts: what runs with gradients has a backward of twice its cost."""
    trained = objective(scale=3.0, warm_up=0, forward={"tangent": tangent})
    counts = {"teacher": 0, "student": 0, "fake": 0}

    def counted(name: str, network: Any) -> Any:
        def call(*inputs: Any) -> Any:
            counts[name] += 3 if torch.is_grad_enabled() else 1
            return network(*inputs)

        return call

    for name in counts:
        setattr(trained, f"_{name}", counted(name, getattr(trained, f"_{name}")))
    rounds = 4
    for step in range(5 * rounds):
        trained.loss(batch(count=1), trained.turn(step))
    guided = 2 * counts["teacher"]
    means = {name: count / (5 * rounds) for name, count in {**counts, "teacher": guided}.items()}
    dense = means["teacher"] + means["fake"]
    if tangent == "jvp":  # it runs the student with its tangent once, and once with gradients
        assert training._FORWARDS["rcm-jvp"] == pytest.approx((dense + means["student"], 0))
        return
    assert training._FORWARDS["rcm"] == pytest.approx((dense, means["student"]))
    assert training._FORWARDS["rcm-dense"] == pytest.approx((dense + means["student"], 0))


def test_the_fake_score_of_a_sparse_student_is_dense(tmp_path: Path) -> None:
    job = training.job("rcm", training.Setup(1), tmp_path)
    teacher = open_denoiser(str(write_teacher(tmp_path / "teacher")), "transformer")
    sparse = {**job, "sla": {"topk": 0.5, "block_q": 64, "block_k": 64}}
    settled = RCMJob.model_validate(sparse)
    parts = Parts(settled, samples=None, teacher=teacher, start=teacher)  # type: ignore[arg-type]
    found = _objective(parts, None, World(0, 1, torch.device("cpu")))
    names = {name: dict(each.network.named_parameters()) for name, each in found.denoisers.items()}
    assert any("proj_l" in key for key in names["student"])
    assert not any("proj_l" in key for key in names["fake"])


@pytest.mark.parametrize(
    ("group", "together", "clips", "label"), [(None, 4, 2, ""), (2, 2, 4, "-2-a-clip")]
)
def test_gpus_share_clips(group: int | None, together: int, clips: int, label: str) -> None:
    record = speed("sla", [1.0] * 4, 8, group=group)
    assert record.value == pytest.approx(clips * 32_760)
    said = record.config["job"]
    assert (said["context_parallel"], said["batch"]) == (together, clips)
    assert record.name.endswith(f"/calibrate-sla{label}/8-gpus/tokens_per_s")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["--together", "2", "--gpus", "2", "3"],
            "--together 2 does not divide each of --gpus [2, 3]",
        ),
        (["--together", "0"], "--together 0 does not divide each of --gpus [1]"),
        (["--together", "-1"], "--together -1 does not divide each of --gpus [1]"),
        (["--jobs", "rcm-jvp", "--compile"], "--jobs rcm-jvp: a forward-mode derivative takes"),
        (["--jobs", "rcm-jvp", "--gpus", "1", "2"], "takes blocks as written, on one GPU"),
        (["--steps", "9"], "--steps 9: a round of rcm is five, and the first is not timed"),
        (["--resume", "--compile"], "--resume has blocks as written"),
        (["--resume", "--together", "1"], "--resume has blocks as written"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    reason: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["training", *words, "--work", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        training.main()
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_round_of_rcm_is_five_steps_and_one_round_has_no_spread() -> None:
    record = speed("rcm", [50.0, 50.0, 9.0, 9.0, 70.0, 1.0, 2.0, 3.0, 4.0, 10.0, 99.0])
    assert record.value == pytest.approx(5 * 32_760 / 20)
    assert (record.runs, record.spread) == (1, 0)


def test_the_ceiling_is_of_all_gpus_at_the_rate_that_is_given() -> None:
    one, two = (speed("sla", [1.0] * 4, gpus) for gpus in (1, 2))
    # The teacher once and the student three times: 2 a weight, 4·L·C a layer, a tenth of it sparse.
    linear = 2 * 30 * (6 * 1536**2 + 2 * 1536 * 8960)
    attention = 4 * 30 * 32_760 * 1536
    operations = 4 * linear + 1.3 * attention
    assert one.ceiling.value == pytest.approx(500e12 / operations)
    assert two.ceiling.value == pytest.approx(2 * one.ceiling.value)
    assert one.share_of_ceiling == pytest.approx(one.value / one.ceiling.value)


def test_the_rate_is_measured_before_a_job_can_use_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[bool] = []
    session = Session(dry=True)

    def steps_of(*_, **__):
        known.append("bf16_matmul" in vars(session))
        return log([1.0] * 4)

    monkeypatch.setattr(training, "Session", lambda dry: session)
    monkeypatch.setattr(training, "steps_of", steps_of)
    (tmp_path / "clips").mkdir()
    words = ["--tiny", "--gpus", "1", "2", "--jobs", "sla", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["training", *words, "--out", str(tmp_path)])
    training.main()
    assert known == [True, True]
    assert len(read(tmp_path / "training.json")) == 2
