"""Weights that the graph does not read: kept for passes, carried along, not saved unread."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_folder import TINY_RECIPE, write_tiny_folder
from turbo_opt.artifact.save import save
from turbo_opt.capture import capture
from turbo_opt.compiler.manager import PassManager
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.storage import read_program, write_program
from turbo_opt.compiler.validation import validate_pipeline

RELEASED = "blocks.0.self_attn.attn_op.local_attn.proj_l"
OURS = "blocks.0.attn1.proj_l"
SHARD = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def projection():
    return {"weight": torch.randn(128, 128), "bias": torch.randn(128)}


@pytest.fixture(scope="module", params=[OURS, RELEASED], ids=["diffusers", "released"])
def program(request, projection, tmp_path_factory):
    """A one-layer model whose checkpoint has `proj_l`, and a weight that nobody knows."""
    folder = write_tiny_folder(
        tmp_path_factory.mktemp("tuned") / "wan", transformer={"num_layers": 1}
    )
    path = folder / "transformer" / SHARD
    tensors = load_file(path)
    tensors |= {f"{request.param}.{part}": value for part, value in projection.items()}
    tensors["blocks.0.attn1.to_z.weight"] = torch.zeros(4)
    save_file(tensors, path)
    return capture(str(folder), num_inference_steps=2)


def test_capture_keeps_projections_aside_under_diffusers_names(program, projection):
    (denoiser,) = program
    assert set(denoiser.unread) == {f"{OURS}.weight", f"{OURS}.bias"}
    assert not set(denoiser.unread) & set(denoiser.weights)
    for part, value in projection.items():
        assert torch.equal(denoiser.unread[f"{OURS}.{part}"].load(), value)


def test_copies_have_their_own(program):
    copy = program.fork()
    del copy.denoisers["transformer"].unread[f"{OURS}.weight"]
    assert f"{OURS}.weight" in program.denoisers["transformer"].unread
    assert copy.digest() != program.digest()


def test_they_survive_storage_and_are_not_counted(program, tmp_path):
    write_program(program, tmp_path)
    restored = read_program(tmp_path)
    assert restored.digest() == program.digest()
    assert set(restored.denoisers["transformer"].unread) == {f"{OURS}.weight", f"{OURS}.bias"}
    (denoiser,) = program
    assert program.weight_bytes == denoiser.weights.nbytes


def test_an_artifact_holds_them_only_where_a_pass_reads_them(program, tmp_path):
    def saved(text, name):
        pipeline = validate_pipeline(parse_pipeline(text))
        optimized = PassManager(pipeline).run(program)
        root = save(optimized, tmp_path / name, recipe=TINY_RECIPE, target="cpu")
        return {name for path in root.rglob("*.safetensors") for name in load_file(path)}

    assert not {name for name in saved("canonicalize", "dense") if "proj_l" in name}
    sparse = saved("canonicalize,fuse-norms,sparse-attention{topk=0.5}", "sparse")
    assert {f"{OURS}.weight", f"{OURS}.bias"} == {name for name in sparse if "proj_l" in name}
