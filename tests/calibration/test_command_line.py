"""`turbo-opt calibrate`: data and tuning from the command line, and what it says when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from turbo_opt.calibration.data import drawing, make
from turbo_opt.calibration.flow import Sampled
from turbo_opt.calibration.networks import build_network, open_denoiser
from turbo_opt.calibration.places import locked
from turbo_opt.calibration.training.world import World
from turbo_opt.cli.main import cli

RECIPE = """\
schema_version: 1
model: {source: ./teacher, dtype: float32}
target: cpu
passes: [canonicalize]
generate: {height: 64, width: 64, num_frames: 5, num_inference_steps: 2, max_sequence_length: 16}
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(item) for item in arguments], prog_name="turbo-opt")


@pytest.fixture(scope="module")
def recipe(home: Path) -> Path:
    path = home / "recipe.yaml"
    path.write_text(RECIPE)
    (home / "captions.txt").write_text("a red circle\n\na blue square\n  a green circle \n")
    return path


@pytest.fixture(scope="module")
def drawn(home: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "samples"
    result = invoke(
        *("calibrate", "data", recipe, "--out", out, "--captions", home / "captions.txt"),
        *("--batch", 2, "--device", "cpu", "--json"),
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["latents"] == [16, 2, 16, 16]
    return out


def test_drawn_samples_are_what_the_teacher_samples(drawn: Path, home: Path) -> None:
    from diffusers import WanPipeline

    from turbo_opt.calibration.data.batches import generator_of
    from turbo_opt.calibration.data.samples import SampleSet

    samples = SampleSet.open(drawn)
    assert [record.caption for record in samples.index.samples] == [
        "a red circle", "a blue square", "a green circle"
    ]  # fmt: skip
    sample = samples.read(1)
    assert sample is not None
    pipeline = WanPipeline.from_pretrained(home / "teacher")
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt="a blue square",
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=5.0,
        max_sequence_length=16,
        latents=torch.randn(1, 16, 2, 16, 16, generator=generator_of(0, 1)),
        output_type="latent",
    ).frames[0]
    assert (sample.latents - expected).norm() < 0.02 * expected.norm()


def test_a_stopped_set_is_continued_and_a_finished_one_kept(
    drawn: Path, home: Path, recipe: Path, tmp_path: Path
) -> None:
    arguments = (
        "calibrate",
        "data",
        recipe,
        "--captions",
        home / "captions.txt",
        "--device",
        "cpu",
    )
    result = invoke(*arguments, "--out", drawn)
    assert result.exit_code == 2 and "holds a set of samples already" in result.stderr
    (drawn / "index.json").rename(tmp_path / "index.json")
    (drawn / "000002.safetensors").unlink()
    kept = (drawn / "000000.safetensors").stat().st_mtime_ns
    other = invoke(*arguments, "--out", drawn, "--seed", 5)
    assert other.exit_code == 2 and "made with other settings, captions" in other.stderr
    assert invoke(*arguments, "--out", drawn).exit_code == 0
    assert (drawn / "000000.safetensors").stat().st_mtime_ns == kept
    assert (drawn / "index.json").read_text() == (tmp_path / "index.json").read_text()


def test_captions_are_encoded_some_at_a_time(
    drawn: Path, home: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    real = make.encode_prompts

    def noted(components: Any, texts: list[str], *more: Any) -> Any:
        encoded.append(texts)
        return real(components, texts, *more)

    monkeypatch.setattr(make, "_ENCODED", 2)
    monkeypatch.setattr(make, "encode_prompts", noted)
    out = tmp_path / "samples"
    result = invoke(
        *("calibrate", "data", recipe, "--out", out, "--captions", home / "captions.txt"),
        *("--batch", 2, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    assert [texts[2:] for texts in encoded] == [
        ["a red circle", "a blue square"],
        ["a green circle"],
    ]
    for path in drawn.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_weights_held_as_products_take_them_give_the_same_bits() -> None:
    folder = open_denoiser("tiny-wan", "transformer")
    network = build_network(folder, World(0, 1, torch.device("cpu")))
    sampled = Sampled(network, folder.config, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 8, 8, generator=generator)
    embeds = torch.randn(1, 12, folder.config["text_dim"], generator=generator)
    given = {"timestep": torch.tensor([437.25]), "encoder_hidden_states": embeds}
    with torch.no_grad():
        (before,) = sampled(latents, **given, return_dict=False)
        nbytes = held_bytes(network)
        drawing.hold_operands(network, torch.bfloat16)
        (after,) = sampled(latents, **given, return_dict=False)
    assert torch.equal(before, after)
    assert held_bytes(network) < 0.51 * nbytes


def held_bytes(network: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def test_two_processes_do_not_make_one_set(home: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = ("calibrate", "data", recipe, "--captions", home / "captions.txt", "--out", out)
    with locked(out, "making samples"):
        second = invoke(*command, "--device", "cpu")
    assert second.exit_code == 2
    assert f"{out}: another process is making samples there" in second.stderr
    assert [item.name for item in out.iterdir()] == [".lock"]
    assert invoke(*command, "--device", "cpu").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captions", "none.txt"], "none.txt"),
        ([], "has no captions of its own; give a text file"),
        (["--captions", "captions.txt", "--count", "9"], "captions.txt holds 3 captions"),
        (["--captions", "captions.txt", "--set", "generate.height=60"], "nearest: 56 or 64"),
    ],
)
def test_data_that_cannot_be_made(
    home: Path, recipe: Path, tmp_path: Path, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(home)
    out = tmp_path / "out"
    result = invoke("calibrate", "data", recipe, "--out", out, "--device", "cpu", *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not out.exists()


def test_tuning_resumes_and_reports(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("calibrate", "sla", home / "job.yaml", "--out", out, "--device", "cpu")
    first = invoke(*arguments, "--set", "training.steps=2")
    assert first.exit_code == 0 and "held-out samples" in first.stdout
    again = invoke(*arguments)
    assert again.exit_code == 2 and "--resume continues it" in again.stderr
    resumed = invoke(*arguments, "--resume", "--set", "training.steps=3", "--json")
    report = json.loads(resumed.stdout)
    assert (report["first_step"], report["steps"]) == (2, 3)


def test_the_closed_form_shows_the_error_of_each_layer(home: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", "sla", home / "job.yaml", "--out", tmp_path / "out")
    result = invoke(*arguments, "--closed-form", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "blocks.1.attn1" in result.stdout
    wrong = invoke(*arguments, "--closed-form", "--resume")
    assert wrong.exit_code == 2 and "--closed-form" in wrong.stderr


def test_a_diverged_training_fails_with_its_place(home: Path, tmp_path: Path, monkeypatch) -> None:

    from turbo_opt.calibration.sla import objective

    def broken(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * torch.nan

    monkeypatch.setattr(objective, "noisy", broken)
    arguments = ("calibrate", "sla", home / "job.yaml", "--out", tmp_path / "out")
    measured = invoke(*arguments, "--device", "cpu")
    assert measured.exit_code == 1
    assert "held_out_loss, held_out_relative_error: not finite after 0 steps" in measured.stderr
    trained = invoke(*arguments, "--device", "cpu", "--set", "data.held_out=0")
    assert trained.exit_code == 1
    assert "the loss is not finite at step 1 of 4" in trained.stderr
    assert not (tmp_path / "out" / "model").exists()


def test_faults_of_a_job_have_file_and_line(home: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", "sla", home / "job.yaml", "--out", tmp_path / "out")
    result = invoke(*arguments, "--set", "sla.topk=7")
    assert result.exit_code == 2 and "--set sla.topk=7: sla.topk: must be" in result.stderr
    unknown = invoke("calibrate", "slaa")
    assert unknown.exit_code == 2 and "did you mean 'sla'" in unknown.stderr


def test_weights_of_another_program_are_converted_in_the_precision_asked_for(
    home: Path, tmp_path: Path
) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    from turbo_opt.calibration.convert import read_weights

    values = read_weights(home / "teacher")
    state = {"net": values, "net_ema": values, "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "rcm.dcp", no_dist=True)
    source, out = tmp_path / "rcm.dcp", tmp_path / "out.safetensors"
    refused = invoke("calibrate", "convert", source, out)
    assert refused.exit_code == 2 and "name one, like `--network net_ema`" in refused.stderr
    options = ("--network", "net_ema", "--dtype", "bfloat16")
    result = invoke("calibrate", "convert", source, out, *options)
    assert result.exit_code == 0, result.stderr
    assert f"{len(values) + 1} of {2 * len(values) + 1} entries are left out" in " ".join(
        result.stderr.split()
    )
    found = load_file(out)
    assert found.keys() == values.keys()
    assert {value.dtype for value in found.values()} == {torch.bfloat16}


def test_weights_are_converted_also_to_int8_blocks(home: Path, tmp_path: Path) -> None:

    source, out = home / "teacher", tmp_path / "teacher-quant.pth"
    refused = invoke("calibrate", "convert", source, tmp_path / "teacher.dcp", "--int8")
    assert refused.exit_code == 2 and "a layout as .pth only; use teacher.pth" in refused.stderr
    assert not list(tmp_path.iterdir())
    result = invoke("calibrate", "convert", source, out, "--int8", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["weights"] == str(out)
    stored = torch.load(out, weights_only=True)
    layers = [name for name in stored if name.endswith(".int8_weight")]
    assert layers and report["tensors"] == len(stored) - len(layers)  # scales are no weights
    assert all(stored[name].dtype == torch.int8 for name in layers)
