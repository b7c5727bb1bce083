"""Weights from elsewhere that a job starts from or learns from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbo_opt.calibration.convert import as_original, convert
from turbo_opt.calibration.given_weights import open_alike
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.networks import DenoiserFolder, build_network, open_denoiser
from turbo_opt.calibration.sla.run import train_sla
from turbo_opt.calibration.training.world import World
from turbo_opt.checkpoints.quantized import in_int8_blocks
from turbo_opt.errors import BadInput

ALONE = World(0, 1, torch.device("cpu"))
FILE = "transformer/diffusion_pytorch_model.safetensors"
PROJECTION = "blocks.0.attn1.proj_l.weight"
Weights = dict[str, torch.Tensor]
Write = Callable[[Path, Weights], object]


def quiet(*told: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def teacher(home: Path) -> DenoiserFolder:
    return open_denoiser(str(home / "teacher"), "transformer")


@pytest.fixture(scope="module")
def weights(home: Path) -> Weights:
    """The teacher's, a little different."""
    torch.manual_seed(2)
    found = load_file(home / "teacher" / FILE)
    return {name: x + 0.05 * x.std() * torch.randn_like(x) for name, x in found.items()}


def as_folder(path: Path, weights: Weights) -> None:
    path.mkdir()
    save_file(weights, path / "weights.safetensors")


def as_wrapped(path: Path, weights: Weights) -> None:
    named = {f"net.{name}": value for name, value in as_original(weights).items()}
    torch.save({"state_dict": named}, path)


LAYOUTS: dict[str, Write] = {
    "diffusers.safetensors": lambda path, weights: save_file(weights, path),
    "released.pth": lambda path, weights: torch.save(as_original(weights), path),
    "dump.pth": as_wrapped,
    "folder": as_folder,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_network_its_weights(teacher, weights, tmp_path, name) -> None:
    LAYOUTS[name](tmp_path / name, weights)
    found = open_alike("student.start", name, teacher, tmp_path)
    assert found.path == tmp_path / name and found.config == teacher.config
    network = build_network(found, ALONE)
    for each, parameter in network.named_parameters():
        assert torch.equal(parameter, weights[each]), each


def test_weights_in_int8_blocks_are_the_numbers_they_stand_for(teacher, weights, tmp_path) -> None:
    torch.save(in_int8_blocks(as_original(weights)), tmp_path / "student-quant.pth")
    network = build_network(
        open_alike("student.start", "student-quant.pth", teacher, tmp_path), ALONE
    )
    value = network.get_parameter("blocks.0.attn1.to_q.weight")
    expected = weights["blocks.0.attn1.to_q.weight"]
    assert 0 < (value - expected).norm() < 0.02 * expected.norm()


def test_names_of_what_lies_in_the_package_are_taken(tmp_path: Path) -> None:
    tiny = open_denoiser("tiny-wan", "transformer")
    found = {
        name: open_alike("student.start", name, tiny, tmp_path).checkpoint({}).unread
        for name in ("tiny-wan", "tiny-wan-rcm", "tiny-wan-sla")
    }
    assert not found["tiny-wan"] and not found["tiny-wan-rcm"]
    assert len(found["tiny-wan-sla"]) == 2 * tiny.config["num_layers"]


def test_one_of_two_experts_is_the_teachers(teacher, weights, tmp_path: Path) -> None:
    (tmp_path / "pair" / "transformer").mkdir(parents=True)
    save_file(weights, tmp_path / "pair" / FILE)
    shutil.copytree(tmp_path / "pair" / "transformer", tmp_path / "pair" / "transformer_2")
    found = open_alike("student.start", "pair", teacher, tmp_path)
    assert found.path == tmp_path / "pair" / "transformer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj_out.bias": None, "scale_shift_table": None},
         "2 weights are missing: proj_out.bias, scale_shift_table"),
        ({"adapter.down": torch.ones(1), PROJECTION: torch.ones(128, 128)},
         "1 are not the model's: adapter.down"),
        ({"proj_out.bias": torch.ones(3)},
         "1 are of other shapes: proj_out.bias [3] instead of [64]"),
    ],
)  # fmt: skip
def test_weights_of_another_model_are_refused_by_name(
    teacher, weights, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    changed = {name: x for name, x in {**weights, **change}.items() if x is not None}
    save_file(changed, tmp_path / "other.safetensors")
    expected = f"start: {tmp_path}/other.safetensors does not hold the weights of the teacher's"
    with pytest.raises(BadInput, match=re.escape(f"{expected} transformer: {message}") + "$"):
        open_alike("start", "other.safetensors", teacher, tmp_path)


def test_a_config_beside_the_weights_counts(teacher, weights, tmp_path: Path) -> None:
    folder = tmp_path / "network"
    as_folder(folder, weights)
    config = (teacher.path / "config.json").read_text()
    (folder / "config.json").write_text(config)
    assert open_alike("start", "network", teacher, tmp_path).path == folder
    (folder / "config.json").write_text(re.sub(r'("eps": )[^,]*', r"\1 0.5", config))
    with pytest.raises(BadInput, match="are different architectures: eps is"):
        open_alike("start", "network", teacher, tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "no/where.pth", "gone.pth"])
def test_what_is_not_there_is_said_with_what_may_be(teacher, tmp_path: Path, source: str) -> None:
    expected = rf"start: {tmp_path}/\S+: no such folder or file; it is a diffusers folder, a file"
    with pytest.raises(BadInput, match=expected):
        open_alike("start", source, teacher, tmp_path)


def test_a_job_starts_from_a_file_and_learns_from_another(
    home: Path, weights: Weights, tmp_path: Path
) -> None:
    job = "start.safetensors", "few.pth"
    save_file(weights, tmp_path / job[0])
    LAYOUTS["released.pth"](tmp_path / job[1], weights)
    file = tmp_path / "job.yaml"
    file.write_text((home / "job.yaml").read_text().replace("./teacher", str(home / "teacher")))
    settings = (
        f"data.folder={home / 'samples'}",
        f"student.start={job[0]}",
        f"companions=[{{source: {job[1]}}}]",
        "training.steps=2",
        "save.every=1",
    )
    out = tmp_path / "out"
    train_sla(load_job(file, SLAJob, settings), out, ALONE, progress=quiet)
    trained = load_file(out / "model" / FILE)
    name = "blocks.0.ffn.net.2.weight"
    distance = (trained[name].float() - weights[name]).norm()
    assert distance < 0.1 * (load_file(home / "teacher" / FILE)[name] - weights[name]).norm()
    # What is learned from is known by its values when the job goes on.
    torch.save(as_original({n: x + 0.01 for n, x in weights.items()}), tmp_path / job[1])
    longer = load_job(file, SLAJob, [*settings, "training.steps=3"])
    with pytest.raises(BadInput, match=r"other weights than are there now of companions\[0\]"):
        train_sla(longer, out, ALONE, resume=True, progress=quiet)


def test_a_checkpoint_is_sent_to_convert_whose_result_is_taken(
    teacher, weights, tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "made.safetensors")
    convert(tmp_path / "made.safetensors", tmp_path / "made.dcp")
    with pytest.raises(BadInput, match=r"is a DCP checkpoint, .*`turbo-opt calibrate convert"):
        open_alike("start", "made.dcp", teacher, tmp_path)
    convert(tmp_path / "made.dcp", tmp_path / "again.pth")
    assert open_alike("start", "again.pth", teacher, tmp_path).path.name == "again.pth"


def test_a_companion_that_is_tuned_for_sparse_attention_is_refused(
    home: Path, weights: Weights, tmp_path: Path
) -> None:
    save_file({**weights, PROJECTION: torch.ones(128, 128)}, tmp_path / "tuned.safetensors")
    named = f"companions=[{{source: {tmp_path}/tuned.safetensors}}]"
    with pytest.raises(
        BadInput, match=r"tuned.safetensors has blocks.0.attn1.proj_l.weight: it is"
    ):
        train_sla(
            load_job(home / "job.yaml", SLAJob, [named]), tmp_path / "o", ALONE, progress=quiet
        )
