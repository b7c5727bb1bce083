"""Weights go from one layout to another and come back the same."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter

from tests.helpers.tiny_folder import shared_folder
from turbo_opt.calibration.convert import as_original, convert, read_weights
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.training.dcp import read_tensors
from turbo_opt.calibration.training.identity import identity_of
from turbo_opt.checkpoints.quantized import in_int8_blocks
from turbo_opt.checkpoints.reader import read_network
from turbo_opt.checkpoints.student import declared_student
from turbo_opt.errors import BadInput
from turbo_opt.ir.transforms import block_quantized
from turbo_opt.kernels.block_quantize import quantize_weight

TEACHER = "transformer/diffusion_pytorch_model.safetensors"
KINDS = [".safetensors", ".pth", ".dcp"]
SAYS = {"distillation": "rcm", "sigma_max": "120.0"}


@pytest.fixture(scope="module")
def weights(home: Path) -> dict[str, torch.Tensor]:
    found = load_file(home / "teacher" / TEACHER)
    return {**found, "blocks.0.attn1.proj_l.weight": torch.randn(128, 128)}


def write_checkpoint(folder: Path, values: dict[str, torch.Tensor]) -> Path:
    """A checkpoint as a training leaves it, the average of one weight twice the weight."""
    state: dict[str, torch.Tensor] = {"student.adamw.updates": torch.zeros(())}
    for name, value in values.items():
        state[f"student.model.{name}"] = value
        state[f"critic.model.{name}"] = -value
    state["critic.adamw.updates"] = torch.zeros(())
    state["student.average.proj_out.bias"] = 2 * values["proj_out.bias"]
    dcp.save(dict(state), storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def of_job(checkpoint: Path, name: str, settings: dict[str, object]) -> Path:
    """The checkpoint, as one of a job."""
    file = checkpoint.with_suffix(".yaml")
    said = {"teacher": {"source": str(shared_folder())}, "data": {"folder": "samples"}, **settings}
    file.write_text(json.dumps({"schema_version": 1, "job": name, **said}))
    job = load_job(file, RCMJob if name == "rcm" else SLAJob, ["training.steps=9"])
    record = {"format": 1, "step": 3, "identity": identity_of(job, 4, {})}
    (checkpoint / "training.json").write_text(json.dumps(record))
    return checkpoint


def stated(place: Path) -> tuple[str, float | None] | None:
    """What `distill-steps` makes of what weights say of themselves."""
    student = declared_student(read_network(place))
    return student and (student.distillation, student.sigma_max)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("suffix", KINDS)
def test_there_and_back(weights, tmp_path: Path, suffix: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "step", weights)
    out = tmp_path / f"out{suffix}"
    assert convert(checkpoint, out, average=False) == len(weights)
    assert_same(read_weights(out), weights)


def test_a_pth_has_the_names_and_shapes_of_the_original(weights, tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "step", weights), tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert found["patch_embedding.weight"].shape == (256, 16 * 4)
    assert "blocks.0.self_attn.attn_op.local_attn.proj_l.weight" in found
    assert "blocks.1.ffn.2.bias" in found and "head.modulation" in found


def test_a_quantized_pth_has_the_integers_and_scales_of_quantize_linear(weights, tmp_path) -> None:
    checkpoint, out = write_checkpoint(tmp_path / "step", weights), tmp_path / "student-quant.pth"
    assert convert(checkpoint, out, average=False, int8=True) == len(weights)
    found = torch.load(out, weights_only=True)
    layers = {name for name, x in weights.items() if name.startswith("blocks.") and x.ndim == 2}
    layers -= {"blocks.0.attn1.proj_l.weight"}
    assert sum(name.endswith(".int8_weight") for name in found) == len(layers) > 0
    q, scale = quantize_weight(weights["blocks.0.attn1.to_q.weight"], "int8-block")
    assert torch.equal(found["blocks.0.self_attn.q.int8_weight"], q)
    assert torch.equal(found["blocks.0.self_attn.q.scale"], scale)
    assert "blocks.0.self_attn.q.weight" not in found
    assert found["blocks.0.self_attn.norm_q.weight"].dtype == torch.float32
    assert found["blocks.0.norm3.bias"].dtype == torch.float32
    assert found["head.head.weight"].dtype == weights["proj_out.weight"].dtype
    with pytest.raises(BadInput, match=r"is in int8 blocks already and would be rounded a second"):
        convert(out, tmp_path / "again.pth", int8=True)
    assert not (tmp_path / "again.pth").exists()
    # Read again, `quantize-linear` finds the same integers and scales.
    read = read_network(out).tensors
    assert read.keys() == weights.keys()
    for name, lazy in read.items():
        if name not in layers:
            assert torch.equal(lazy.load().view(-1), weights[name].view(-1)), name
            continue
        kept = [part.load() for part in block_quantized(lazy, "int8-block")]
        expected = quantize_weight(weights[name], "int8-block")
        assert all(map(torch.equal, kept, expected)), name


def test_int8_is_for_pth_and_layers_of_whole_blocks(weights, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step", weights)
    expected = "int8 blocks have a layout as .pth only; use out.pth"
    with pytest.raises(BadInput, match=re.escape(expected)):
        convert(checkpoint, tmp_path / "out.safetensors", int8=True)
    narrow = {"blocks.0.ffn.0.weight": torch.zeros(256, 130)}
    with pytest.raises(BadInput, match=r"'blocks.0.ffn.0.weight' has 130 inputs; int8 blocks take"):
        in_int8_blocks(narrow)
    assert not list(tmp_path.glob("out*"))


def test_the_average_and_the_network_can_be_chosen(weights, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step", weights)
    bias = weights["proj_out.bias"]
    assert torch.equal(read_weights(checkpoint)["proj_out.bias"], 2 * bias)
    assert torch.equal(read_weights(checkpoint, average=False)["proj_out.bias"], bias)
    assert torch.equal(read_weights(checkpoint, "critic")["proj_out.bias"], -bias)
    with pytest.raises(BadInput, match="unknown network 'studnt', did you mean 'student'"):
        read_weights(checkpoint, "studnt")


def test_a_dcp_folder_of_another_program_is_read_under_diffusers_names(tmp_path: Path) -> None:
    state = {"net.blocks.0.self_attn.q.bias": torch.ones(2), "net.head.head.bias": torch.zeros(3)}
    dcp.save(dict(state), storage_writer=FileSystemWriter(tmp_path / "rcm.dcp"), no_dist=True)
    found = read_weights(tmp_path / "rcm.dcp")
    assert sorted(found) == ["blocks.0.attn1.to_q.bias", "proj_out.bias"]


def written(folder: Path, state: dict[str, object]) -> Path:
    """A DCP folder of another program."""
    dcp.save(dict(state), storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def test_of_several_networks_of_another_program_one_has_to_be_named(weights, tmp_path) -> None:
    original = as_original(weights)
    nets = {"net": 1, "net_ema": 2}
    state = {f"{net}.{name}": by * x for net, by in nets.items() for name, x in original.items()}
    folder = written(tmp_path / "rcm.dcp", state)
    several = r"rcm.dcp: holds several networks \('net', 'net_ema'\); name one, like `--network net"
    with pytest.raises(BadInput, match=several + "_ema`"):
        convert(folder, tmp_path / "out.safetensors")
    with pytest.raises(BadInput, match="unknown network 'net_em', did you mean 'net_ema'"):
        convert(folder, tmp_path / "out.safetensors", "net_em")
    for net, by in nets.items():
        said: list[str] = []
        convert(folder, tmp_path / f"{net}.safetensors", net, say=said.append)
        assert_same(
            load_file(tmp_path / f"{net}.safetensors"), {n: by * x for n, x in weights.items()}
        )
        assert f"{len(weights)} of {2 * len(weights)} entries are left out, as they" in said[0]


@pytest.mark.parametrize("prefix", ["", "model.", "net.", "model.net_ema."])
def test_what_another_program_puts_before_names_is_no_part_of_them(
    weights, tmp_path: Path, prefix: str
) -> None:
    folder = written(
        tmp_path / "theirs.dcp", {f"{prefix}{n}": x for n, x in as_original(weights).items()}
    )
    assert_same(read_weights(folder), weights)


def test_of_a_whole_training_only_the_weights_are_taken(weights, tmp_path: Path) -> None:
    original = as_original(weights)
    moments = {name: {"exp_avg": x, "step": torch.ones(())} for name, x in original.items()}
    state = {
        "model": {**original, "accum_iteration": torch.zeros(())},
        "optimizer": {"state": moments, "param_groups": {"lr": 0.1}},
        "step": 7,
    }
    said: list[str] = []
    folder = written(tmp_path / "training.dcp", state)
    assert_same(read_weights(folder, say=said.append), weights)
    count = 2 * len(weights) + 3
    assert f"{count} of {count + len(weights)} entries are left out, as they are no w" in said[0]
    assert "weights of its network 'model': model.accum_iteration, " in said[0]


def test_an_entry_that_is_no_tensor_is_never_unpickled(weights, tmp_path: Path) -> None:
    name = "net.head.head.bias"
    folder = written(tmp_path / "trap.dcp", {name: {1, 2}, "net.head.head.weight": torch.ones(2)})
    assert list(read_weights(folder)) == ["proj_out.weight"]
    with pytest.raises(BadInput, match=f"lacks 1 of 1 tensors \\({name}\\)"):
        read_tensors(folder, {name: torch.ones(2)})


@pytest.mark.parametrize("suffix", ["dcp", "pth", "safetensors"])
def test_weights_of_something_else_are_refused(tmp_path: Path, suffix: str) -> None:
    state = {"encoder.layers.0.weight": torch.ones(2), "blocks.0.attn.qkv.weight": torch.ones(2)}
    source = tmp_path / f"other.{suffix}"
    if suffix == "dcp":
        written(source, state)
    elif suffix == "pth":
        torch.save(state, source)
    else:
        save_file(state, source)
    none = (
        r"other\.\w+: none of its 2 tensors is named like a weight of Wan, .* \(blocks.0.attn.qkv"
    )
    with pytest.raises(BadInput, match=none):
        convert(source, tmp_path / "out.safetensors")


def test_a_network_is_chosen_in_dcp_folders_only(home: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="teacher: is no DCP folder, so it holds one network; leave"):
        convert(home / "teacher", tmp_path / "out.safetensors", "student")


def test_an_unfinished_checkpoint_is_told_from_an_empty_folder(weights, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / ".step-000200.partial", weights)
    (checkpoint / ".metadata").unlink()
    with pytest.raises(BadInput, match=r"is an unfinished DCP checkpoint: .* `latest` in"):
        convert(checkpoint, tmp_path / "out.safetensors")


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("from_files", [False, True])
def test_the_precision_is_that_asked_for_but_of_sparse_attention(
    weights, tmp_path: Path, suffix: str, from_files: bool
) -> None:
    stored = {**weights, "blocks.1.attn1.proj_l.bias": torch.randn(128).bfloat16()}
    source = tmp_path / "source.safetensors"
    if from_files:
        save_file(stored, source)
    else:
        source = write_checkpoint(tmp_path / "step", stored)
    convert(source, tmp_path / f"out{suffix}", average=False, dtype=torch.float16)
    expected = {n: x.float() if "proj_l" in n else x.half() for n, x in stored.items()}
    found = read_weights(tmp_path / f"out{suffix}")
    assert_same(found, expected)
    assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in expected.items()}


def test_a_safetensors_file_is_written_without_holding_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "large.safetensors"
    names = [f"blocks.{layer}.ffn.0.weight" for layer in range(12)]
    save_file({name: torch.zeros(4096, 4096, dtype=torch.bfloat16) for name in names}, source)
    script = (
        "import resource, sys, torch; from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        "from turbo_opt.calibration.convert import convert\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"convert(Path({str(source)!r}), Path({str(tmp_path / 'out.safetensors')!r}), "
        "dtype=torch.float32)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert int(made.stdout) < 500 * 2**10  # KiB; the result is 768 MiB
    assert (tmp_path / "out.safetensors").stat().st_size > 768 * 2**20


def test_a_diffusers_folder_is_read(home: Path, tmp_path: Path) -> None:
    convert(home / "teacher", tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), load_file(home / "teacher" / TEACHER))


def test_of_two_experts_one_has_to_be_named(home: Path, tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    shutil.copytree(home / "teacher", pair)
    shutil.copytree(pair / "transformer", pair / "transformer_2")
    which = f"pair: has two denoisers; convert {pair}/transformer or {pair}/transformer_2"
    with pytest.raises(BadInput, match=which):
        convert(pair, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    convert(pair / "transformer_2", tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), load_file(home / "teacher" / TEACHER))


def test_samples_are_not_weights(home: Path, samples_folder, tmp_path: Path) -> None:
    folder = samples_folder(2)
    where = "weights are in the `model` folder and the checkpoints of a job"
    with pytest.raises(BadInput, match=f"samples: is a set of samples to learn from; {where}"):
        convert(folder, tmp_path / "out.safetensors")
    (folder / "index.json").unlink()  # as a set that is still being made
    with pytest.raises(BadInput, match="is a set of samples to learn from"):
        convert(folder, tmp_path / "out.safetensors")
    with pytest.raises(BadInput, match=r"000001\.safetensors: is a sample, with the latents of"):
        convert(folder / "000001.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_cannot_be_written(weights, home: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot write '\.bin'; use \.safetensors, \.pth or \.dcp"):
        convert(home / "teacher", tmp_path / "out.bin")
    (tmp_path / "out.pth").touch()
    with pytest.raises(BadInput, match="exists already"):
        convert(home / "teacher", tmp_path / "out.pth")
    checkpoint = write_checkpoint(tmp_path / "step", {**weights, "adapter.down": torch.ones(1)})
    with pytest.raises(BadInput, match=r"adapter\.down: the original Wan has no such weight"):
        convert(checkpoint, tmp_path / "other.pth")
    assert not (tmp_path / "other.pth").exists()


@pytest.mark.parametrize("through", KINDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_student_remains_one_in_every_layout(
    weights, tmp_path: Path, suffix: str, through: str
) -> None:
    transformer = tmp_path / "model" / "transformer"
    transformer.mkdir(parents=True)
    save_file(weights, transformer / "diffusion_pytorch_model.safetensors", metadata=SAYS)
    between, out = tmp_path / f"a{through}", tmp_path / f"b{suffix}"
    convert(tmp_path / "model", between)
    convert(between, out)
    assert stated(out) == ("rcm", 120.0)
    assert_same(read_weights(out), weights)


def test_all_that_a_file_says_of_itself_is_kept(weights, tmp_path: Path) -> None:
    said = {"turbo_opt": '{"steps": 9}', **SAYS}
    save_file(weights, tmp_path / "made.safetensors", metadata=said)
    for suffix in KINDS:
        convert(tmp_path / "made.safetensors", tmp_path / f"out{suffix}")
    assert read_network(tmp_path / "out.safetensors").metadata == {"format": "pt", **said}
    assert json.loads((tmp_path / "out.json").read_text()) == said
    assert json.loads((tmp_path / "out.dcp" / "distillation.json").read_text()) == said
    torch.load(tmp_path / "out.pth", weights_only=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_of_rcm_is_of_a_student(weights, tmp_path: Path, suffix: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "step", weights)
    of_job(checkpoint, "rcm", {"rcm": {"sigma_max": 120, "warm_up": 2}})
    convert(checkpoint, tmp_path / f"student{suffix}")
    assert stated(tmp_path / f"student{suffix}") == ("rcm", 120.0)
    convert(checkpoint, tmp_path / f"critic{suffix}", network="critic")
    assert stated(tmp_path / f"critic{suffix}") is None


def test_what_says_nothing_of_itself_is_not_made_a_student(weights, tmp_path: Path) -> None:
    checkpoint = of_job(write_checkpoint(tmp_path / "step", weights), "sla", {})
    convert(checkpoint, tmp_path / "sla.pth")
    convert(checkpoint, tmp_path / "sla.safetensors")
    assert stated(tmp_path / "sla.safetensors") is None
    assert read_network(tmp_path / "sla.safetensors").metadata == {"format": "pt"}
    assert not (tmp_path / "sla.json").exists()


def test_what_is_said_beside_the_weights_goes_with_them(weights, tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "step", weights), tmp_path / "theirs.pth")
    note = tmp_path / "theirs.json"
    note.write_text(json.dumps({"distillation": "dmd2", "sigma_max": 9, "by": ["me"]}))
    convert(tmp_path / "theirs.pth", tmp_path / "out.safetensors")
    said = read_network(tmp_path / "out.safetensors").metadata
    assert said == {"format": "pt", "distillation": "dmd2", "sigma_max": "9.0"}
    for content, message in (
        ("{", r"theirs\.json: not valid JSON"),
        ('{"distillation": "rcm", "sigma_max": 0}', r"theirs\.json: sigma_max: .* greater than 0"),
    ):
        note.write_text(content)
        with pytest.raises(BadInput, match=message):
            convert(tmp_path / "theirs.pth", tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_a_json_that_would_speak_for_a_new_pth_is_not_taken_over(weights, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step", weights)
    (tmp_path / "out.json").write_text(json.dumps(SAYS))
    with pytest.raises(BadInput, match=r"out\.json: exists already, and would count as what out"):
        convert(checkpoint, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
