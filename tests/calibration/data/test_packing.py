"""Samples packed into shards as they are drawn: a kill leaves whole shards and whole files."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tests.calibration.conftest import LATENTS, TEXT_DIM, TEXT_LENGTH
from turbo_opt.calibration.data import packing as module
from turbo_opt.calibration.data.packing import SampleFiles
from turbo_opt.calibration.data.samples import SampleSet, write_sample
from turbo_opt.cli.main import cli

CAPTIONS = ("a red circle", "a blue square", "ein grüner Kreis", "a circle", "a square")
RECIPE = """\
schema_version: 1
model: {source: ./teacher, dtype: float32}
target: cpu
passes: [canonicalize]
generate: {height: 64, width: 64, num_frames: 5, num_inference_steps: 1, max_sequence_length: 16}
"""


def draw(files: SampleFiles, *numbers: int) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        latents = torch.randn(LATENTS, generator=generator)
        embeds = torch.randn(number + 1, TEXT_DIM, generator=generator)
        write_sample(files.own(number), latents, embeds)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sharded(folder: Path) -> SampleFiles:
    folder.mkdir(exist_ok=True)
    return SampleFiles(folder, CAPTIONS, TEXT_LENGTH, shard_size=2)


def test_a_shard_is_packed_when_its_samples_and_those_before_are_there(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    draw(files, 0, 2, 3)
    files.pack()
    assert names(tmp_path) == ["000000.safetensors", "000002.safetensors", "000003.safetensors"]
    draw(files, 1)
    files.pack()
    assert names(tmp_path) == ["shard-000000.tar", "shard-000001.tar"]
    assert [files.holds(number) for number in range(5)] == [True] * 4 + [False]
    draw(files, 4)
    files.pack()
    assert names(tmp_path) == [f"shard-{number:06d}.tar" for number in range(3)]
    with tarfile.open(tmp_path / "shard-000001.tar") as archive:
        assert archive.getnames() == [
            "000002.safetensors",
            "000002.json",
            "000003.safetensors",
            "000003.json",
        ]
        assert archive.extractfile("000002.json").read() == (  # type: ignore[union-attr]
            '{"caption": "ein grüner Kreis", "text_length": 16}'.encode()
        )


def test_shards_are_read_as_they_were_drawn_without_an_index(tmp_path: Path) -> None:
    apart = SampleFiles(tmp_path, CAPTIONS, TEXT_LENGTH, shard_size=None)
    draw(apart, *range(5))
    apart.pack()
    assert [record.file for record in apart.records()] == names(tmp_path)
    files = sharded(tmp_path / "shards")
    draw(files, *range(5))
    files.pack()
    samples = SampleSet.open(tmp_path / "shards")
    assert tuple(record.caption for record in samples.index.samples) == CAPTIONS
    assert (samples.index.latents, samples.index.text_length) == (LATENTS, TEXT_LENGTH)
    assert [record.file for record in files.records()] == [
        f"{samples.name(number)}.safetensors" for number in range(5)
    ]
    for number in range(5):
        sample = samples.read(number)
        assert sample is not None
        expected = torch.randn(LATENTS, generator=torch.Generator().manual_seed(number))
        assert torch.equal(sample.latents, expected.half().float())


class Killed(BaseException):
    """Nothing of ours catches it."""


def killed(*_: object, **__: object) -> None:
    raise Killed


def test_a_kill_while_packing_leaves_the_samples_own_files(tmp_path: Path, monkeypatch) -> None:
    files = sharded(tmp_path)
    draw(files, *range(5))
    real = SampleFiles._members

    def killed_in_the_second(self: SampleFiles, numbers: range):
        for place, file in enumerate(real(self, numbers)):
            if numbers.start == 2 and place == 2:
                raise Killed
            yield file

    with monkeypatch.context() as patch:
        patch.setattr(SampleFiles, "_members", killed_in_the_second)
        with pytest.raises(Killed):
            files.pack()
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["shard-000000.tar"]
    assert len(SampleSet.open(tmp_path)) == 2
    (tmp_path / "shards.index.json").unlink()
    again = sharded(tmp_path)
    assert all(map(again.holds, range(5)))
    again.pack()
    assert names(tmp_path) == [f"shard-{number:06d}.tar" for number in range(3)]


def test_a_kill_before_the_samples_own_files_are_removed(tmp_path: Path, monkeypatch) -> None:
    files = sharded(tmp_path)
    draw(files, *range(5))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            files.pack()
    assert {"000000.safetensors", "shard-000000.tar"} <= set(names(tmp_path))
    kept = (tmp_path / "shard-000000.tar").stat().st_mtime_ns
    sharded(tmp_path).pack()
    assert names(tmp_path) == [f"shard-{number:06d}.tar" for number in range(3)]
    assert (tmp_path / "shard-000000.tar").stat().st_mtime_ns == kept


@pytest.fixture
def make(home: Path, tmp_path: Path):
    """Runs `calibrate data` for five captions."""
    recipe = home / "packing.yaml"
    recipe.write_text(RECIPE)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))

    def run(out: str, *arguments: object) -> Result:
        fixed = ("--captions", tmp_path / "captions.txt", "--batch", 2, "--device", "cpu")
        given = ("calibrate", "data", recipe, "--out", tmp_path / out, *fixed, *arguments)
        return CliRunner().invoke(cli, [str(item) for item in given], prog_name="turbo-opt")

    return run


def test_a_sharded_set_goes_on_after_a_kill_and_is_the_same(make, tmp_path, monkeypatch) -> None:
    straight = make("straight", "--shard-size", 2)
    assert straight.exit_code == 0, straight.output
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tar", killed)
        with pytest.raises(Killed):
            make("out", "--shard-size", 2)
    assert len(list((tmp_path / "out").glob("0*.safetensors"))) == 2
    other = make("out", "--shard-size", 3)
    assert other.exit_code == 2 and "made with other settings" in other.stderr
    resumed = make("out", "--shard-size", 2, "--json")
    assert json.loads(resumed.stdout)["count"] == 5
    found = names(tmp_path / "out")
    assert found == [
        ".lock",
        "empty.safetensors",
        "index.json",
        "making.json",
        *(f"shard-{number:06d}.tar" for number in range(3)),
    ]
    for name in found:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    samples = SampleSet.open(tmp_path / "out")
    assert samples.name(4) == "shard-000002.tar/000004.safetensors"
    assert [samples.read(number) is not None for number in range(5)] == [True] * 5
    assert samples.empty_prompt().shape == (TEXT_LENGTH, TEXT_DIM)
