"""Lazy weights: read only when needed, written down as JSON, told apart by digest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from turbo_opt.errors import BadInput
from turbo_opt.ir import disk
from turbo_opt.ir.disk import new_pages
from turbo_opt.ir.files import SafetensorsFile
from turbo_opt.ir.transforms import block_quantized
from turbo_opt.ir.weights import WeightStore, cast, constant, from_file, from_json, to_json


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    save_file({"w": torch.randn(256, 128), "b": torch.randn(256).bfloat16()}, path)
    return str(path)


def test_a_tensor_is_read_only_when_it_is_loaded(shard, monkeypatch):
    reads = []
    honest = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda self, key: reads.append(key) or honest(self, key)
    )
    tensor = cast(from_file(shard, "w"), torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((256, 128), torch.bfloat16, 65536)
    assert tensor.digest
    assert reads == []
    assert tensor.load().dtype == torch.bfloat16
    assert reads == ["w"]


def test_values_and_scales_of_one_layer_are_computed_together(shard, monkeypatch):
    reads = []
    honest = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda self, key: reads.append(key) or honest(self, key)
    )
    values, scales = block_quantized(from_file(shard, "w"), "int8-block")
    store = WeightStore({"q": values, "b": from_file(shard, "b"), "s": scales})
    result = dict(store.items_by_producer())
    assert set(result) == {"q", "s", "b"}
    assert result["q"].dtype == torch.int8
    assert result["s"].shape == (2, 1)
    assert sorted(reads) == ["b", "w"]


@pytest.mark.parametrize("direct", [True, False])
def test_long_reads_give_the_same_bytes_with_and_without_the_cache(tmp_path, monkeypatch, direct):
    path = tmp_path / "long.safetensors"
    torch.manual_seed(0)
    values = {"odd": torch.randn(5), "w": torch.randn(1111, 1000), "z": torch.randn(3)}
    save_file(values, path)
    if not direct:
        monkeypatch.setattr(disk, "_DIRECT", 0)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file = SafetensorsFile.open(str(path))
    rows = file.read_rows("w", 7, 1111, new_pages(4 * 1104 * 1000))
    assert torch.equal(rows, values["w"][7:])
    read = file.read("w")
    assert torch.equal(read, values["w"])
    assert read.data_ptr() % 64 == 0  # as torch allocates: sums in BLAS depend on it
    assert torch.equal(file.read_rows("z", 1, 3, new_pages(8)), values["z"][1:])


def test_an_expression_survives_json(shard):
    values, scales = block_quantized(cast(from_file(shard, "w"), torch.bfloat16), "fp8-block")
    for tensor in (values, scales, constant(torch.arange(5)), constant(torch.empty(0))):
        again = from_json(json.loads(json.dumps(to_json(tensor))))
        assert again.digest == tensor.digest
        assert torch.equal(again.load().float(), tensor.load().float())


def test_digests_tell_expressions_and_files_apart(shard, tmp_path):
    w = from_file(shard, "w")
    values, scales = block_quantized(w, "int8-block")
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(256, 128)}, other)
    digests = {
        w.digest,
        cast(w, torch.float16).digest,
        values.digest,
        scales.digest,
        block_quantized(w, "fp8-block")[0].digest,
        from_file(str(other), "w").digest,
    }
    assert len(digests) == 6
    assert from_file(shard, "w").digest == w.digest


def test_a_missing_key_names_the_nearest(shard):
    with pytest.raises(BadInput, match="no tensor 'ww', did you mean 'w'"):
        from_file(shard, "ww")


def test_a_truncated_file_is_refused(shard):
    path = Path(shard)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match="truncated, tensor"):
        from_file(shard, "w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file"),
        (b"\xff" * 8 + b"{}", "not a whole safetensors file"),
        (b"\x02" + b"\0" * 7 + b"[]", "not a JSON object"),
        (b"\x02" + b"\0" * 7 + b"{!", "is not JSON"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        SafetensorsFile.open(str(path))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not fit its byte range"),
        ({"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}, "unknown dtype 'X9'"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "does not fit"),
        ({"dtype": "F32", "shape": [1]}, "malformed header entry"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}, "truncated"),
    ],
)
def test_a_lying_header_entry_is_refused(tmp_path, entry, message):
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(BadInput, match=message):
        SafetensorsFile.open(str(path))
