"""`verify` replays the stored input and says how close it came."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_folder import write_tiny_folder
from turbo_opt.artifact import verify as verify_module
from turbo_opt.artifact.manifest import MANIFEST, read_manifest
from turbo_opt.artifact.replay import read_replay
from turbo_opt.artifact.save import save
from turbo_opt.artifact.verify import verify
from turbo_opt.capture import capture


def test_an_intact_artifact_replays_bit_for_bit_where_it_was_made(stored: Path) -> None:
    report = verify(stored)
    (replay,) = report.replays
    assert report.passed
    assert replay.bitwise
    assert replay.same_environment
    assert (report.files, report.changed, report.skipped) == (
        len(read_manifest(stored).files),
        {},
        {},
    )
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] is True


def test_both_experts_are_replayed(stored_pair: Path) -> None:
    report = verify(stored_pair)
    assert [replay.denoiser for replay in report.replays] == ["transformer", "transformer_2"]
    assert report.passed


def test_a_model_with_image_tokens_of_two_images_is_replayed(tmp_path: Path) -> None:
    config = {"num_layers": 1, "in_channels": 36, "image_dim": 24, "added_kv_proj_dim": 256}
    folder = write_tiny_folder(tmp_path / "flf", transformer={**config, "pos_embed_seq_len": 514})
    program = capture(str(folder), dtype="float32", num_inference_steps=2)
    assert verify(save(program, tmp_path / "a")).passed
    inputs, _ = read_replay(tmp_path / "a", "replay/transformer.safetensors")
    assert inputs["encoder_hidden_states_image"].shape == (2, 257, 24)


def test_a_small_difference_passes_elsewhere_but_not_in_the_same_environment(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change_expected(copy, 1e-4)
    assert not verify(copy).passed
    monkeypatch.setattr(verify_module, "fingerprint", lambda: "another machine")
    report = verify(copy)
    assert report.passed
    assert 60 < report.replays[0].sqnr_db < 100


def test_a_large_difference_never_passes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _change_expected(copy, 0.1)
    monkeypatch.setattr(verify_module, "fingerprint", lambda: "another machine")
    report = verify(copy)
    assert not report.passed
    assert report.replays[0].sqnr_db < 50


def test_versions_that_changed_are_listed(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["environment"]["torch"] = "2.11.0"
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert verify(copy).changed == {"torch": ("2.11.0", str(torch.__version__))}


def test_a_replay_pair_is_small_and_finite(stored: Path) -> None:
    inputs, output = read_replay(stored, "replay/transformer.safetensors")
    assert set(inputs) == {"hidden_states", "timestep", "encoder_hidden_states"}
    assert output.isfinite().all()
    assert output.shape == inputs["hidden_states"].shape


def _change_expected(root: Path, noise: float) -> None:
    name = "replay/transformer.safetensors"
    tensors = load_file(root / name)
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(tensors["output"].shape, generator=generator) * tensors["output"].std()
    tensors["output"] += noise * shift
    save_file(tensors, root / name)
    content = (root / name).read_bytes()
    manifest = json.loads((root / MANIFEST).read_text())
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["files"][name] = record
    (root / MANIFEST).write_text(json.dumps(manifest))
