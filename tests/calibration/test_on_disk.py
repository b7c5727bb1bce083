"""What takes its place by a rename is on disk by then, and the name soon after."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.calibration.conftest import LATENTS, TEXT_DIM, TEXT_LENGTH
from turbo_opt.calibration.convert import convert
from turbo_opt.calibration.data.samples import (
    INDEX,
    SampleIndex,
    SampleRecord,
    write_index,
    write_sample,
)
from turbo_opt.calibration.export import export_model
from turbo_opt.calibration.jobs.schema import Saving
from turbo_opt.calibration.networks import open_denoiser
from turbo_opt.calibration.training.checkpoints import LATEST, Checkpoints
from turbo_opt.calibration.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


class Disk:
    """Which files and folders were waited for, and which of them before they were renamed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._synced: set[int] = set()
        self._renamed: dict[int, bool] = {}
        patch.setattr(os, "fsync", self._notes(os.fsync))
        for name in ("rename", "replace"):
            patch.setattr(os, name, self._moves(getattr(os, name)))

    def _notes(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(handle: int) -> None:
            self._synced.add(os.fstat(handle).st_ino)
            real(handle)

        return fsync

    def _moves(self, real: Callable[..., None]) -> Callable[..., None]:
        def move(source: Path, target: Path) -> None:
            for path in (Path(source), *Path(source).rglob("*")):
                if not path.is_symlink():
                    self._renamed[path.stat().st_ino] = path.stat().st_ino in self._synced
            self._synced.discard(Path(target).parent.stat().st_ino)
            real(source, target)

        return move

    def holds(self, path: Path) -> bool:
        """Whether a file or folder was on disk before its name was, and its name since."""
        places = [each for each in (path, *path.rglob("*")) if not each.is_symlink()]
        return all(self._renamed.get(each.stat().st_ino) for each in places)

    def names_in(self, folder: Path) -> bool:
        """Whether a folder was waited for since the last rename in it."""
        return folder.stat().st_ino in self._synced


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_samples_and_their_index(tmp_path: Path, disk: Disk) -> None:
    sample = tmp_path / "000000.safetensors"
    write_sample(sample, torch.randn(LATENTS), torch.randn(5, TEXT_DIM))
    assert disk.holds(sample)
    index = SampleIndex(
        format=1,
        latents=LATENTS,
        text_length=TEXT_LENGTH,
        text_dim=TEXT_DIM,
        samples=(SampleRecord(file=sample.name),),
    )
    write_index(tmp_path, index)
    assert disk.holds(tmp_path / INDEX) and disk.names_in(tmp_path)


def test_an_exported_model_in_several_files(home: Path, tmp_path: Path, disk: Disk) -> None:
    folder, values = (
        open_denoiser(str(home / "teacher"), "transformer"),
        load_file(home / "teacher" / WEIGHTS),
    )
    model = tmp_path / "model"
    for _ in range(2):  # the second replaces the first
        export_model(folder, values, model, torch.bfloat16, {}, ALONE, shard_bytes=2**20)
        assert len(list((model / "transformer").iterdir())) > 4
        assert disk.holds(model) and disk.names_in(tmp_path)


def test_a_checkpoint_and_what_says_that_it_is_the_newest(tmp_path: Path, disk: Disk) -> None:
    checkpoints = Checkpoints(tmp_path / "saved", Saving(asynchronous=False), ALONE)
    checkpoints.save(1, {"x": torch.ones(2)}, {})
    newest = checkpoints.latest()
    assert newest is not None and disk.holds(newest)
    assert disk.holds(newest.with_name(LATEST)) and disk.names_in(newest.parent)


def test_converted_weights(home: Path, tmp_path: Path, disk: Disk) -> None:
    convert(home / "teacher", tmp_path / "teacher.safetensors")
    assert disk.holds(tmp_path / "teacher.safetensors") and disk.names_in(tmp_path)
