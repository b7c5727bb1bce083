"""PyTorch files as lazy weights: mapped, restricted, told apart, and equal to safetensors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from turbo_opt.errors import BadInput
from turbo_opt.ir.tensor_files import open_tensor_file
from turbo_opt.ir.torch_files import TorchFile
from turbo_opt.ir.weights import cast, from_file, from_json, to_json

VALUES = {
    "w": torch.arange(24.0).reshape(6, 4),
    "b": torch.randn(5).bfloat16(),
    "turned": torch.arange(12.0).reshape(3, 4).t(),
    "number": torch.tensor(4.0),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.fixture
def path(tmp_path):
    torch.save(VALUES, tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


def test_tensors_are_described_and_read(path):
    file = open_tensor_file(path)
    assert isinstance(file, TorchFile)
    assert file.keys() == list(VALUES)
    assert file.describe("b") == ((5,), torch.bfloat16)
    for name, value in VALUES.items():
        found = file.read(name)
        assert torch.equal(found, value) and found.is_contiguous() and not found.requires_grad
    assert torch.equal(file.read_rows("turned", 1, 3, torch.empty(0)), VALUES["turned"][1:3])


def test_they_are_lazy_weights(path):
    tensor = cast(from_file(path, "w"), torch.bfloat16)
    assert from_json(to_json(tensor)).digest == tensor.digest
    assert torch.equal(tensor.load(), VALUES["w"].bfloat16())
    bands = [band.load({})[0] for band in tensor.bands(32)]
    assert len(bands) == 3 and torch.equal(torch.cat(bands), VALUES["w"].bfloat16())


def test_data_is_mapped_not_read(tmp_path):
    big = torch.zeros(64 * 2**20, dtype=torch.uint8)
    torch.save({"w": big}, tmp_path / "big.pth")
    before = _resident()
    from_file(str(tmp_path / "big.pth"), "w")
    assert _resident() - before < 16 * 2**20


def test_a_changed_file_is_another_one(path):
    before = open_tensor_file(path).identity
    torch.save({"w": torch.zeros(6, 4)}, path)
    assert open_tensor_file(path).keys() == ["w"]
    assert open_tensor_file(path).identity != before


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_training_dumps_are_looked_into(tmp_path, wrapper):
    dump = {"iteration": 3, wrapper: VALUES, "optimizer": {"state": {}}}
    torch.save(dump, tmp_path / "dump.pth")
    assert open_tensor_file(str(tmp_path / "dump.pth")).keys() == list(VALUES)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": torch.ones(2), "run": Harmful()}, "holds more than tensors and plain containers"),
        ([torch.ones(2)], "holds a list instead of named tensors"),
        ({"w": torch.ones(2), "step": 3}, "'step' is a int; a file of weights holds named tensors"),
        ({"state_dict": {"w": torch.ones(2), "step": 3}}, "'step' is a int"),
        ({0: torch.ones(2)}, "0 is a Tensor; a file of weights holds named"),
        ({"w": torch.eye(2).to_sparse()}, "'w' is no plain dense tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'w' has the dtype torch.complex64"),
    ],
)
def test_anything_but_tensors_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "bad.pth")
    with pytest.raises(BadInput, match=message):
        open_tensor_file("bad.pth")
    assert not Path("harmed").exists()


def test_a_plain_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.pth").write_bytes(pickle.dumps({"run": Harmful()}))
    with pytest.raises(BadInput, match=r"bad.pth"):
        open_tensor_file("bad.pth")
    assert not Path("harmed").exists()


def test_older_and_damaged_files_are_refused_with_the_remedy(tmp_path, path):
    torch.save(VALUES, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match="save it again with a current PyTorch"):
        open_tensor_file(str(tmp_path / "old.pth"))
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="not a whole PyTorch file"):
        open_tensor_file(path)
    with pytest.raises(BadInput, match="cannot be read"):
        open_tensor_file(str(tmp_path / "none.pth"))


def test_a_missing_key_names_the_nearest(path):
    with pytest.raises(BadInput, match="no tensor 'ww', did you mean 'w'"):
        from_file(path, "ww")


def _resident():
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096
