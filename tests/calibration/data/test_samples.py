"""Sets of samples: broken ones are skipped with a reason, up to a share; tars are read in place."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.calibration.conftest import LATENTS, TEXT_DIM, TEXT_LENGTH
from turbo_opt.calibration.data import listed
from turbo_opt.calibration.data.samples import SampleSet, write_sample
from turbo_opt.errors import BadInput


def spoil(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {"latents": torch.zeros(LATENTS), "prompt_embeds": torch.zeros(2, TEXT_DIM)}
    kept = {**tensors, **changes}
    save_file({name: value for name, value in kept.items() if value is not None}, path)


def test_a_sample_comes_back_padded_to_the_text_length(samples_folder) -> None:
    folder = samples_folder()
    latents, embeds = torch.randn(LATENTS), torch.randn(TEXT_LENGTH, TEXT_DIM)
    embeds[3:] = 0
    write_sample(folder / "000002.safetensors", latents, embeds)
    sample = SampleSet.open(folder).read(2)
    assert sample is not None and sample.name == "000002.safetensors"
    torch.testing.assert_close(sample.latents, latents.half().float())
    torch.testing.assert_close(sample.prompt_embeds, embeds.bfloat16().float())
    assert (folder / "000002.safetensors").stat().st_size < 2 * latents.numel() + 1000


def test_an_empty_prompt_of_zeros_keeps_one_position(samples_folder) -> None:
    folder = samples_folder()
    write_sample(folder / "empty.safetensors", None, torch.zeros(4, TEXT_DIM))
    assert not SampleSet.open(folder).empty_prompt().any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"latents": torch.zeros(16, 2, 16, 18)}, "16×2×16×18, must be 16×2×16×16"),
        ({"latents": None}, "has no 'latents', only prompt_embeds"),
        ({"latents": torch.full(LATENTS, torch.nan)}, "latents holds values that are not finite"),
        ({"latents": torch.zeros(LATENTS, dtype=torch.int8)}, "must be floating point"),
        (
            {"prompt_embeds": torch.zeros(17, TEXT_DIM)},
            "has 17 positions, the set's text_length is 16",
        ),
        ({"prompt_embeds": torch.zeros(2, 9)}, "2×9, must be any×32"),
    ],
)
def test_a_broken_sample_is_skipped_with_its_reason(samples_folder, changes, reason) -> None:
    folder = samples_folder()
    spoil(folder / "000001.safetensors", **changes)
    samples = SampleSet.open(folder, broken_share=0.2)
    assert samples.read(1) is None and samples.read(0) is not None
    assert reason in samples.broken[1]


def test_a_cut_file_is_broken(samples_folder) -> None:
    folder = samples_folder()
    path = folder / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    samples = SampleSet.open(folder, broken_share=0.2)
    assert samples.read(1) is None and "is no safetensors file" in samples.broken[1]


def test_too_many_broken_samples_stop_the_job_and_are_named(samples_folder) -> None:
    folder = samples_folder()
    for number in (1, 4):
        (folder / f"{number:06d}.safetensors").unlink()
    with pytest.raises(
        BadInput, match=r": at least 2 of 8 samples are broken, .* allows 20% \(000001"
    ):
        SampleSet.open(folder, broken_share=0.2)
    samples = SampleSet.open(folder, broken_share=0.25)
    spoil(folder / "000002.safetensors", latents=None)
    with pytest.raises(BadInput, match="3 of 8 samples are broken"):
        samples.read(2)


def test_the_first_broken_sample_is_named_whichever_was_read_first(samples_folder) -> None:
    folder = samples_folder()
    samples = SampleSet.open(folder, broken_share=0.2)
    for number in (5, 1):
        spoil(folder / f"{number:06d}.safetensors", latents=None)
    assert samples.read(5) is None
    with pytest.raises(BadInput, match=r"allows 20% \(000001\.safetensors: .*000005"):
        samples.read(1)


def test_samples_lie_in_tars_too(samples_folder) -> None:
    folder = samples_folder()
    expected = SampleSet.open(folder).read(3)
    index = json.loads((folder / "index.json").read_text())
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "a.tar", "w") as archive:
        for record in index["samples"]:
            archive.add(folder / record["file"], f"clips/{record['file']}")
            (folder / record["file"]).unlink()
            record["file"] = f"shards/a.tar/clips/{record['file']}"
    (folder / "index.json").write_text(json.dumps(index))
    sample = SampleSet.open(folder).read(3)
    assert expected is not None and sample is not None
    assert torch.equal(sample.latents, expected.latents)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../secret.safetensors", "lies outside the folder"),
        ("/etc/passwd", "lies outside the folder"),
        ("a.tar/x", "a.tar has no member 'x'"),
        ("b.tar/x", "b.tar is not an uncompressed tar"),
        ("a\0b", "has a name that no file has"),
        ("a.tar/../pipe", "lies outside the folder"),
        ("pipe", "is no file"),
    ],
)
def test_places_that_an_index_must_not_name(samples_folder, file, reason) -> None:
    folder = samples_folder()
    with tarfile.open(folder / "a.tar", "w"):
        pass
    (folder / "b.tar").write_bytes(b"not a tar" * 100)
    os.mkfifo(folder / "pipe")
    index = json.loads((folder / "index.json").read_text())
    index["samples"][0]["file"] = file
    (folder / "index.json").write_text(json.dumps(index))
    assert reason in SampleSet.open(folder, broken_share=0.2).broken[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no index.json and no .tar shards; turbo-opt calibrate data makes"),
        ("{", "not an index of samples"),
        ('{"format": 2}', r"not an index of samples \(format: input should be 1"),
        (
            '{"format":1, "latents":[1,1,1,1], "text_length":1, "text_dim":1, "samples":[]}',
            "lists no samples",
        ),
    ],
)
def test_a_folder_without_a_right_index_is_refused(tmp_path: Path, content, message) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        SampleSet.open(tmp_path)


def test_a_set_that_is_still_being_made_is_refused(samples_folder) -> None:
    folder = samples_folder()
    (folder / "index.json").rename(folder / "making.json")
    with pytest.raises(BadInput, match="was stopped; the same command goes on"):
        SampleSet.open(folder)


def test_a_cut_tar_is_looked_at_once_for_all_its_samples(samples_folder, monkeypatch) -> None:
    folder = samples_folder()
    index = json.loads((folder / "index.json").read_text())
    with tarfile.open(folder / "a.tar", "w") as archive:
        for record in index["samples"]:
            archive.add(folder / record["file"], record["file"])
            record["file"] = f"a.tar/{record['file']}"
    (folder / "index.json").write_text(json.dumps(index))
    whole = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(whole[: len(whole) // 2])
    looks = []
    real = listed.members
    monkeypatch.setattr(listed, "members", lambda path: looks.append(path) or real(path))
    with pytest.raises(BadInput, match=r"8 of 8 samples are broken.*a.tar is .*cut off"):
        SampleSet.open(folder)
    assert len(looks) == 1


def test_a_missing_empty_prompt_names_the_command_that_makes_it(samples_folder) -> None:
    folder = samples_folder()
    (folder / "empty.safetensors").unlink()
    with pytest.raises(BadInput, match=r"turbo-opt calibrate data, or set data.unconditional"):
        SampleSet.open(folder).empty_prompt()
