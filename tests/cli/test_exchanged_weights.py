"""A distilled, sparse student from foreign files to a clip: recipe, run, save, load, sample."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

import turbo_opt
from benchmarks.results import ROOT
from tests.cli.conftest import invoke
from tests.helpers.checkpoints import projections, write_layout, write_safetensors
from tests.helpers.tiny_folder import tiny_transformer_config, write_tiny_folder
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.config.loader import load_recipe
from turbo_opt.ir.rcm import rcm_schedule
from turbo_opt.runtime.sampler import initial_latents, sample

RECIPE = """\
schema_version: 1
description: a distilled student with the difference of a sparse tuning, and a LoRA
model: {source: ./wan, dtype: float32}
target: cpu
weights:
  student: ./student.pth
  sla: ./sla.pth
  base: ./base.safetensors
  style: ./style.safetensors
passes:
  - distill-steps: {weights: student, student: assume}
  - merge-weights:
      target: sla
      reference: base
      weight: 0.5
      loras: [{weights: style, scale: 0.25}]
  - canonicalize
generate:
  {height: 32, width: 48, num_frames: 5, fps: 8, num_inference_steps: 2, max_sequence_length: 16}
"""
FAST = """\
distill-steps{weights=student student=assume steps=4},merge-weights{target=sla reference=base},\
canonicalize,fuse-norms,sparse-attention{topk=0.5},fuse-qk-norm-rope,\
quantize-linear{scheme=int8-block},fuse-norm-quantize,fuse-epilogues,hoist-invariants"""
SHAPE = (1, 16, 2, 8, 12)
Q = "blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with a model, files of three trainings of it and a LoRA, and a recipe."""
    root = tmp_path_factory.mktemp("exchanged")
    write_tiny_folder(root / "wan", transformer={"num_layers": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = tiny_transformer_config(num_layers=1)
        trained = [diffusers.WanTransformer3DModel(**config).eval().state_dict() for _ in range(3)]
        matrices = torch.randn(4, 256) / 16, torch.randn(256, 4) / 16
    student, sla, base = trained
    write_layout("rcm", root / "student", student)
    write_layout("turbodiffusion", root / "sla", sla | projections(1))
    write_layout("original", root / "base", base)
    down, up = (f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight" for part in "AB")
    write_safetensors(root / "style.safetensors", {down: matrices[0], up: matrices[1]})
    (root / "recipe.yaml").write_text(RECIPE)
    expected = {name: student[name] + 0.5 * (sla[name] - base[name]) for name in student}
    expected[f"{Q}.weight"] = expected[f"{Q}.weight"] + 0.25 * (matrices[1] @ matrices[0])
    return root, expected


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another working directory than the recipe's."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def embeddings():
    return torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(3))


def test_exchanged_weights_and_steps_are_those_of_the_formula(sources, elsewhere):
    root, expected = sources
    result = invoke("run", root / "recipe.yaml", "--out", "out", "--no-cache", "--quiet")
    assert result.exit_code == 0, result.stderr
    artifact = turbo_opt.load("out")
    assert artifact.schedule == rcm_schedule(4, 80.0, "sde")
    model = diffusers.WanTransformer3DModel(**tiny_transformer_config(num_layers=1)).eval()
    model.load_state_dict(expected)
    clips = []
    for network in (model, artifact.transformer):
        generator = torch.Generator().manual_seed(1)
        latents = initial_latents(artifact.schedule, SHAPE, generator)
        clips.append(
            sample(
                {"transformer": network}, artifact.schedule, embeddings(), latents=latents,
                generator=generator,
            )
        )  # fmt: skip
    torch.testing.assert_close(clips[1], clips[0], rtol=1e-4, atol=1e-5)
    assert artifact.manifest.history[1]["stats"]["kept_aside"] == 2


def test_a_sparse_quantized_student_runs_its_four_steps(sources, elsewhere):
    root, _ = sources
    arguments = (root / "recipe.yaml", "--passes", FAST)
    planned = invoke("plan", *arguments, "--json")
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["evaluations_per_clip"] == 4
    result = invoke("run", *arguments, "--out", "fast", "--no-cache", "--quiet")
    assert result.exit_code == 0, result.stderr
    artifact = turbo_opt.load("fast")
    record = artifact.manifest.denoisers["transformer"]
    assert f"{Q.removesuffix('.to_q')}.proj_l.weight" in record.tensors
    assert f"{Q}.quantized_weight" in record.tensors
    frames = artifact.generate("a red circle", seed=1)
    assert frames.shape == (5, 32, 48, 3)
    assert invoke("verify", "fast").exit_code == 0
    shown = invoke("inspect", "fast")
    assert shown.exit_code == 0 and "distill-steps" in shown.stdout


def test_results_are_taken_over_until_a_file_changes(sources, elsewhere):
    root, _ = sources
    arguments = ("run", root / "recipe.yaml", "--no-verify", "--resume", "--json", "--cache-dir")

    def cached(out):
        result = invoke(*arguments, "cache", "--out", out)
        assert result.exit_code == 0, result.stderr
        return [item["cached"] for item in json.loads(result.stdout)["passes"]]

    assert cached("one") == [False] * 3
    assert cached("two") == [True] * 3
    style = root / "style.safetensors"
    content = style.read_bytes()
    style.write_bytes(content[:-4] + b"\0\0\0\0")
    try:
        assert cached("three") == [True, False, False]
    finally:
        style.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "weights.student=./gone.pth",
            r"recipe.yaml:11:5: passes.distill-steps: no weights 'student' (",
        ),
        ("passes.distill-steps.weights=studnet", "no weights 'studnet': neither a name in the"),
        ("passes.merge-weights.target=ROOT/wan/model_index.json", "not a file of weights"),
        ("passes.distill-steps.student=declared", "does not say that it is a distilled student"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_is_wrong_with_the_files_is_said_and_nothing_is_written(
    sources, elsewhere, command, change, message
):
    root, _ = sources
    out = ("--out", "out", "--no-cache") if command == "run" else ()
    change = change.replace("ROOT", str(root))
    result = invoke(command, root / "recipe.yaml", "--set", change, *out)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert not list(Path.cwd().iterdir())


def test_the_recipe_in_the_docs_is_one(elsewhere):
    text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    example = text.split("```yaml\n")[1].split("```")[0]
    (elsewhere / "mine.yaml").write_text(example)
    recipe = load_recipe(elsewhere / "mine.yaml")
    names = [planned.spec.name for planned in validate_pipeline(recipe.specs())]
    assert names[:2] == ["distill-steps", "merge-weights"]
    assert recipe.checkpoints() == {
        "student": str(elsewhere / "rcm-1.3b.pth"),
        "sla": str(elsewhere / "sla-1.3b.safetensors"),
        "base": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    }


@pytest.mark.parametrize("command", ["run", "plan"])
def test_weights_that_no_merge_brings_are_missed_before_any_is_read(sources, elsewhere, command):
    root, _ = sources
    out = ("--out", "out", "--no-cache") if command == "run" else ()
    text = FAST.replace("target=sla", "target=base")
    result = invoke(command, root / "recipe.yaml", "--passes", text, *out)
    assert result.exit_code == 2
    assert "sparse-attention needs weights named blocks.0.attn1.proj_l.weight" in result.stderr
    assert not list(Path.cwd().iterdir())
