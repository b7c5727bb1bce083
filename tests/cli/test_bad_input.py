"""Everything a user can get wrong: exit code 2, one clear message, nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

from tests.helpers.tiny_folder import write_tiny_folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--passes", "canonicalise"], "unknown pass 'canonicalise', did you mean 'canonicalize'?"),
        (
            ["--passes", "canonicalize,fuse-norms{adalm=false}"],
            "unknown option 'adalm', did you mean 'adaln'?",
        ),
        (["--passes", "canonicalize,,"], "expected a pass name"),
        (
            ["--passes", "fuse-norms,canonicalize"],
            "requires the fact 'canonical', which does not hold here; move 'canonicalize' before",
        ),
        (["--passes", "canonicalize", "--set", "passes.x.y=1"], "--passes replaces"),
        (["--disable-pass", "canonicalize"], "add 'canonicalize' before 'fuse-norms'"),
        (["--disable-pass", "fuse-norm"], "no pass 'fuse-norm', did you mean 'fuse-norms'?"),
        (["--until", "fuze-norms"], "no pass 'fuze-norms', did you mean 'fuse-norms'?"),
        (["--set", "generate.heigth=64"], "unknown key 'heigth', did you mean 'height'?"),
        (["--set", "generate.height"], "must be KEY=VALUE"),
        (["--set", "target=rtx4099"], "unknown target 'rtx4099', did you mean 'rtx4090'?"),
        (
            ["--set", "passes.quantize-linear.scheme=fp8-block"],
            "passes.quantize-linear: cpu cannot run fp8-block, only int8-block",
        ),
        (["--set", "passes.quantize-linear.skip={names: 3}"], "names: must be a list, got 3"),
        (["--verify", "all", "--no-verify"], "contradict each other"),
        (["--no-cache", "--cache-dir", "here"], "contradict each other"),
        (["--set", "model.source=./nothing"], "no such folder"),
    ],
)  # fmt: skip
def test_wrong_recipes_and_options(refused, recipe, arguments, message):
    assert message in refused("run", recipe, "--out", "out", *arguments)


def test_unknown_keys_of_a_recipe_are_named_with_file_and_line(refused, recipe, work):
    (work / "my.yaml").write_text(recipe.read_text() + "verfy: {}\n")
    message = refused("run", "my.yaml", "--out", "out")
    assert "my.yaml:14:1: verfy: unknown key 'verfy', did you mean 'verify'?" in message


def test_a_folder_that_is_no_wan_pipeline(refused, spoiled):
    def other_class(folder):
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = "FluxPipeline"
        (folder / "model_index.json").write_text(json.dumps(index))

    message = refused("run", spoiled(other_class), "--out", "out")
    assert "not a Wan pipeline" in message
    assert "FluxPipeline" in message


def test_a_folder_without_a_pipeline(refused, spoiled):
    recipe = spoiled(lambda folder: (folder / "model_index.json").unlink())
    assert "no model_index.json" in refused("plan", recipe)


def _shard(folder):
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def _set_config(folder, **values):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: _shard(folder).unlink(), "holds neither"),
        (lambda folder: os.truncate(_shard(folder), 4_000_000), "truncated, tensor"),
        (lambda folder: _set_config(folder, ffn_dim=384), "config.json asks for"),
    ],
    ids=["missing", "truncated", "mis-shaped"],
)
def test_shards_that_do_not_fit(refused, spoiled, change, message):
    assert message in refused("run", spoiled(change), "--out", "out", "--no-verify")


def test_a_selector_that_matches_nothing(refused, recipe):
    message = refused(
        "run", recipe, "--out", "out", "--dump-ir", "ir",
        "--set", 'passes.quantize-linear.skip={names: ["*.atn2.*"]}',
    )  # fmt: skip
    assert "skip.names '*.atn2.*' matches no linear layer" in message


def test_a_dimension_that_the_scheme_cannot_divide(refused, recipe, model, work, tmp_path_factory):
    folder = write_tiny_folder(tmp_path_factory.mktemp("odd") / "m", transformer={"ffn_dim": 200})
    (work / "r.yaml").write_text(recipe.read_text().replace(str(model), str(folder)))
    message = refused("run", "r.yaml", "--out", "out")
    assert "blocks.0.ffn.net.2 has in_features 200, int8-block needs a multiple of 128" in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("height=33", "generate.height = 33: must be a multiple of 8"),
        ("num_frames=6", "generate.num_frames = 6: must be 4·n + 1"),
        ("width=80000", "generate.width = 80000: must be a multiple of 8 and at most"),
    ],
)
def test_a_clip_size_that_the_model_cannot_take(refused, recipe, setting, message):
    assert message in refused("run", recipe, "--out", "out", "--set", f"generate.{setting}")


def test_places_that_are_not_ours(refused, recipe, work, artifact):
    (work / "mine").mkdir()
    (work / "mine" / "thesis.txt").write_text("precious")
    (work / "file").write_text("a file")
    (work / "out.reproducer").mkdir()
    (work / "out.reproducer" / "thesis.txt").write_text("precious")
    assert "is not a turbo_opt artifact" in refused("run", recipe, "--out", "mine", "--overwrite")
    assert "exists and is not a directory" in refused("run", recipe, "--out", "file")
    assert "is not a turbo_opt artifact" in refused("run", recipe, "--out", ".")
    assert "file is not a folder" in refused("run", recipe, "--out", "file/below")
    assert "--overwrite replaces it" in refused("run", recipe, "--out", artifact)
    assert "none of ours" in refused("run", recipe, "--out", "out")
    assert "is no IR dump" in refused("run", recipe, "--out", "x", "--dump-ir", "mine")
    assert "must be a folder" in refused("run", recipe, "--out", "x", "--cache-dir", "file")
    assert "not from an earlier demo" in refused("demo", "--out", "mine", "--recipe", recipe)


def test_a_disk_that_is_too_small_is_found_before_any_work(refused, recipe, monkeypatch):
    little = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    message = refused("run", recipe, "--out", "out")
    assert "the artifact needs" in message
    assert "are free" in message


def test_a_disk_that_fills_up_while_saving(refused, recipe, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    message = refused("run", recipe, "--out", "out", "--no-verify", "--no-cache")
    assert "the artifact needs" in message


def test_a_folder_that_may_not_be_written(refused, recipe, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out")

    monkeypatch.setattr("turbo_opt.artifact.save.save", denied)
    message = refused("run", recipe, "--out", "out", "--no-verify", "--no-cache")
    assert message == "out: permission denied"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nothing"], "not a turbo_opt artifact"),
        (["inspect", "nothing"], "not a turbo_opt artifact"),
        (["diff", "ARTIFACT", "nothing"], "not a turbo_opt artifact"),
        (["generate", "nothing", "--prompt", "a", "--out", "a.mp4"], "not a turbo_opt artifact"),
        (["generate", "ARTIFACT", "--prompt", "a", "--out", "a.avi"], "use .mp4, .gif or .png"),
        (["generate", "ARTIFACT", "--prompt", "a", "--out", "no/a.mp4"], "no does not exist"),
        (
            ["generate", "ARTIFACT", "--prompt", "a", "--out", "a.mp4", "--height", "33"],
            "height = 33: must be a multiple of 8",
        ),
        (
            ["generate", "ARTIFACT", "--prompt", "a", "--out", "a.mp4", "--num-frames", "6"],
            "num_frames = 6",
        ),
        (
            ["generate", "ARTIFACT", "--prompt", "a", "--out", "a.mp4", "--components", "./none"],
            "no such folder",
        ),
        (["generate", "ARTIFACT", "--prompt", "a", "--out", "a.mp4", "--fps", "0"], "range"),
        (["generate", "ARTIFACT", "--prompt", "a", "--out", "a.mp4", "--fps", "nan"], "fps nan: m"),
        (["reproduce", "ARTIFACT"], "not a reproducer"),
    ],
)
def test_wrong_artifacts_and_clips(refused, artifact, arguments, message):
    assert message in refused(*[artifact if item == "ARTIFACT" else item for item in arguments])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--height", 33], "height = 33: must be a multiple of 8 and at most 4096; nearest: 32"),
        (["--num-frames", 9999], "num_frames = 9999: must be 4·n + 1 and at most 1021"),
    ],
)
def test_a_clip_size_is_refused_before_the_artifact_is_loaded(
    refused, artifact, monkeypatch, option, message
):
    def loaded(*_, **__):
        raise AssertionError("nothing of the network may be read yet")

    monkeypatch.setattr("turbo_opt.artifact.load.read_graph", loaded)
    monkeypatch.setattr("turbo_opt.artifact.load.StoredWeights", loaded)
    options = ["--prompt", "a", "--out", "a.mp4", "--device", "cpu"]
    assert message in refused("generate", artifact, *options, *option)


def test_a_manifest_with_a_wrong_value_is_named_with_its_key(refused, artifact, work):
    shutil.copytree(artifact, work / "copy")
    path = work / "copy" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["denoisers"]["transformer"]["config"]["in_channels"] = "x"
    path.write_text(json.dumps(manifest))
    message = refused("generate", "copy", "--prompt", "a", "--out", "a.mp4", "--device", "cpu")
    assert message.startswith("copy/manifest.json: denoisers.transformer.config.in_channels: ")


def test_a_gpu_that_is_not_there(refused, artifact, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "sees no CUDA GPU" in refused("verify", artifact, "--device", "cuda")
