"""Checkpoints are whole or not there, and strangers' are neither trusted nor mistaken."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from turbo_opt.calibration.jobs.schema import Saving
from turbo_opt.calibration.training.checkpoints import Checkpoints, read_record
from turbo_opt.calibration.training.dcp import read_metadata, read_tensors
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput, TurboOptError

ALONE = World(0, 1, torch.device("cpu"))


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((3, 2), value), "updates": torch.tensor(value)}


def checkpoints(folder: Path, keep: int = 2, asynchronous: bool = False) -> Checkpoints:
    return Checkpoints(folder, Saving(keep=keep, asynchronous=asynchronous), ALONE)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_saved_checkpoint_is_the_latest_and_comes_back(tmp_path, asynchronous) -> None:
    store = checkpoints(tmp_path / "c", asynchronous=asynchronous)
    assert store.latest() is None
    saved = tensors(3.0)
    store.save(5, saved, {"identity": {"job": "x"}})
    saved["model.weight"].fill_(9)  # training goes on
    store.finish()
    path = store.latest()
    assert path == tmp_path / "c" / "step-000005"
    found = tensors(0.0)
    store.load(path, found)
    assert all(torch.equal(found[name], value) for name, value in tensors(3.0).items())
    assert read_record(path) == {"format": 1, "step": 5, "identity": {"job": "x"}}


def test_old_checkpoints_go_when_newer_are_whole(tmp_path) -> None:
    store = checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 1_000_000):
        store.save(step, tensors(step), {})
    assert names(tmp_path) == ["latest", "step-000003", "step-1000000"]


def test_a_run_that_goes_on_from_an_earlier_step_keeps_what_it_saves(tmp_path) -> None:
    """A later folder, which `latest` never named, counts for nothing and goes for nothing."""
    store = checkpoints(tmp_path, keep=1)
    store.save(100, tensors(1.0), {})
    (tmp_path / "step-000200").mkdir()
    store.save(150, tensors(2.0), {})
    assert store.latest() == tmp_path / "step-000150"
    store.load(store.latest(), tensors(0.0))
    assert names(tmp_path) == ["latest", "step-000150", "step-000200"]


def test_what_a_stopped_save_left_goes_when_another_is_loaded(tmp_path) -> None:
    store = checkpoints(tmp_path)
    store.save(1, tensors(1.0), {})
    (tmp_path / ".step-000002.partial").mkdir()
    store.load(store.latest(), tensors(0.0))
    assert names(tmp_path) == ["latest", "step-000001"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_dies_leaves_the_one_before(tmp_path, monkeypatch, asynchronous) -> None:
    store = checkpoints(tmp_path, asynchronous=asynchronous)
    store.save(1, tensors(1.0), {})
    store.finish()

    def disk_full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "finish", disk_full)

    def save() -> None:
        store.save(2, tensors(2.0), {})
        store.finish()

    with pytest.raises(TurboOptError, match=r"step 2 could not be written .*No space left"):
        save()
    monkeypatch.undo()
    later = checkpoints(tmp_path)
    assert later.latest() == tmp_path / "step-000001"
    later.load(later.latest(), tensors(0.0))
    later.save(2, tensors(2.0), {})
    assert later.latest() == tmp_path / "step-000002"
    assert names(tmp_path) == ["latest", "step-000001", "step-000002"]


def test_a_kill_between_rename_and_pointer_leaves_the_one_before(tmp_path, monkeypatch) -> None:
    store = checkpoints(tmp_path)
    store.save(1, tensors(1.0), {})
    module = "turbo_opt.calibration.training.checkpoints.os.replace"
    monkeypatch.setattr(module, lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.save(2, tensors(2.0), {})
    monkeypatch.undo()
    assert checkpoints(tmp_path).latest() == tmp_path / "step-000001"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoints(tmp_path).save(1, tensors(1.0), {})
    return tmp_path / "step-000001"


def test_an_unfinished_folder_is_named(saved: Path) -> None:
    (saved / ".metadata").unlink()
    with pytest.raises(BadInput, match=r"has no \.metadata, so it is no DCP checkpoint, or one"):
        read_tensors(saved, tensors(0.0))


def test_a_missing_part_is_damage(saved: Path) -> None:
    (saved / "__0_0.distcp").unlink()
    with pytest.raises(BadInput, match="cannot be read, it is damaged"):
        read_tensors(saved, tensors(0.0))


@pytest.mark.parametrize(("left", "why"), [(0, "EOFError"), (700, "PytorchStreamReader failed")])
def test_a_cut_part_is_damage_in_one_line(saved: Path, left: int, why: str) -> None:
    part = saved / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:left])
    with pytest.raises(BadInput) as refused:
        read_tensors(saved, tensors(0.0))
    said = str(refused.value)
    assert said.startswith(f"{saved}: cannot be read, it is damaged ({why}")
    assert "\n" not in said and "Traceback" not in said


def test_of_a_damaged_checkpoint_the_one_before_is_named(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, keep=4)
    for step in (1, 2, 3, 4):
        store.save(step, tensors(step), {})
    (tmp_path / "step-000003" / "training.json").unlink()  # not whole
    (tmp_path / "step-000005").mkdir()  # later, and not whole either
    for step in (1, 4):
        (tmp_path / f"step-00000{step}" / "__0_0.distcp").write_bytes(b"")
    way = rf"damaged \(.*\); write step-000002 into {tmp_path}/latest, and --resume goes on"
    with pytest.raises(BadInput, match=way):
        store.load(store.latest(), tensors(0.0))
    with pytest.raises(BadInput, match=r"damaged \(.*\); there is no checkpoint before it"):
        store.load(tmp_path / "step-000001", tensors(0.0))
    (tmp_path / "latest").write_text("step-000002\n")
    found = tensors(0.0)
    store.load(store.latest(), found)
    assert torch.equal(found["updates"], torch.tensor(2.0))


@pytest.mark.parametrize("file", [".metadata", "training.json"])
def test_of_an_unfinished_checkpoint_the_one_before_is_named(tmp_path: Path, file: str) -> None:
    store = checkpoints(tmp_path, keep=4)
    for step in (1, 2):
        store.save(step, tensors(step), {})
    (tmp_path / "step-000002" / file).unlink()
    with pytest.raises(BadInput, match=rf"; write step-000001 into {tmp_path}/latest, and"):
        store.record(store.latest())
    assert store.record(tmp_path / "step-000001")["step"] == 1


def test_another_model_is_told_by_names_and_by_shapes(saved: Path) -> None:
    with pytest.raises(BadInput, match=r"lacks 1 of 1 tensors \(other\); it is a checkpoint of"):
        read_tensors(saved, {"other": torch.zeros(1)})
    with pytest.raises(BadInput, match=r"model.weight has shape \[3, 2\], this model needs \[2\]"):
        read_tensors(saved, {"model.weight": torch.zeros(2)})


def test_a_dcp_folder_of_another_program_is_no_checkpoint_of_ours(saved: Path) -> None:
    (saved / "training.json").unlink()
    with pytest.raises(BadInput, match=r"has no readable training\.json"):
        read_record(saved)
    (saved / "training.json").write_text(json.dumps({"format": 7, "step": 1}))
    with pytest.raises(BadInput, match="not of format 1"):
        read_record(saved)


def test_metadata_may_not_run_code(saved: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return shutil.rmtree, (str(tmp_path / "precious"),)

    (tmp_path / "precious").mkdir()
    (saved / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BadInput, match=r"it wants to load shutil\.(_rmtree|rmtree|_RmtreeType)"):
        read_metadata(saved)
    assert (tmp_path / "precious").is_dir()


@pytest.mark.parametrize("content", [b"", b"\x80", b"junk" * 9, pickle.dumps({"a": 1})])
def test_metadata_that_is_none_is_refused(saved: Path, content: bytes) -> None:
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(BadInput, match="not the metadata of a DCP checkpoint"):
        read_metadata(saved)


def test_a_damaged_byte_of_the_metadata_is_never_an_error_of_ours(saved: Path) -> None:
    content = (saved / ".metadata").read_bytes()
    refused = 0
    for at in range(0, len(content), 5):
        changed = bytearray(content)
        changed[at] ^= 0x41
        (saved / ".metadata").write_bytes(changed)
        try:
            read_metadata(saved)
        except BadInput:
            refused += 1
    assert refused > 20


def test_pickled_objects_in_a_checkpoint_are_refused(tmp_path: Path) -> None:
    state = {"weight": torch.zeros(2), "settings": {"rate": object}}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    with pytest.raises(BadInput, match=r"holds pickled objects \(settings.rate\)"):
        read_metadata(tmp_path)


def test_a_pointer_to_nothing_is_named(tmp_path: Path) -> None:
    for name in ("step-000009", "../elsewhere"):
        (tmp_path / "latest").write_text(f"{name}\n")
        with pytest.raises(BadInput, match="which is no checkpoint"):
            checkpoints(tmp_path).latest()
