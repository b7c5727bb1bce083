"""Artifacts come from anyone: what is wrong with one is named, and nothing in it is executed."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import turbo_opt
from turbo_opt.artifact.graph_file import read_graph
from turbo_opt.artifact.manifest import MANIFEST, read_manifest
from turbo_opt.artifact.verify import verify
from turbo_opt.errors import BadInput
from turbo_opt.ir.files import SafetensorsFile
from turbo_opt.runtime.generate import clip_options

GRAPH = "denoisers/transformer.pt2"
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_a_flipped_byte_anywhere_is_found_and_the_file_named(copy: Path) -> None:
    for name in read_manifest(copy).files:
        original = (copy / name).read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 1
        (copy / name).write_bytes(damaged)
        with pytest.raises(BadInput, match="damaged") as caught:
            verify(copy)
        assert str(copy / name) in str(caught.value)
        (copy / name).write_bytes(original)


def test_load_with_check_finds_a_flipped_byte_in_a_weight(copy: Path) -> None:
    shard = copy / read_manifest(copy).denoisers["transformer"].shards[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BadInput, match="SHA-256"):
        turbo_opt.load(copy, check=True)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / GRAPH).unlink()
    for read in (verify, turbo_opt.load):
        with pytest.raises(BadInput, match=r"transformer\.pt2: missing from the artifact"):
            read(copy)


def test_a_truncated_file_is_named_with_both_sizes(copy: Path) -> None:
    size = (copy / GRAPH).stat().st_size
    (copy / GRAPH).write_bytes((copy / GRAPH).read_bytes()[:-10])
    with pytest.raises(BadInput, match=f"{size - 10} bytes, the manifest says {size}"):
        turbo_opt.load(copy)


def test_a_file_that_the_manifest_does_not_know_is_named(copy: Path) -> None:
    (copy / "denoisers" / "extra.py").touch()
    with pytest.raises(BadInput, match=r"extra\.py: the manifest does not know"):
        verify(copy)


def test_a_newer_format_names_both_versions_and_what_to_do(copy: Path) -> None:
    def newer(manifest: dict[str, Any]) -> None:
        manifest["format_version"] = 7
        manifest["environment"]["turbo_opt"] = "9.1.0"
        manifest["something"] = "new"

    _edit(copy, newer)
    with pytest.raises(BadInput, match=r"format 7.*9\.1\.0.*up to 2.*upgrade turbo_opt"):
        turbo_opt.load(copy)


@pytest.mark.parametrize(
    "path", ["../evil", "/etc/passwd", "a/../../b", "a//b", ".hidden", "", "a\\b"]
)
def test_a_manifest_path_that_leads_outside_is_refused(copy: Path, path: str) -> None:
    def escape(manifest: dict[str, Any]) -> None:
        manifest["files"][path] = manifest["files"].pop(GRAPH)
        manifest["denoisers"]["transformer"]["graph"] = path

    _edit(copy, escape)
    with pytest.raises(BadInput, match="plain relative path inside the artifact"):
        turbo_opt.load(copy)


def test_a_link_that_leads_outside_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / GRAPH).rename(tmp_path / "elsewhere.pt2")
    (copy / GRAPH).symlink_to(tmp_path / "elsewhere.pt2")
    with pytest.raises(BadInput, match="a link that leads out of the artifact"):
        turbo_opt.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra=1), "extra: Extra inputs"),
        (lambda m: m.pop("schedule"), "schedule: Field required"),
        (lambda m: m["schedule"]["steps"][0].update(denoiser="ghost"), "no denoiser 'ghost'"),
        (lambda m: m["schedule"].update(steps=[]), r"schedule\.steps"),
        (lambda m: m["schedule"]["steps"][0].update(timestep=math.nan), r"timestep: .*finite"),
        (lambda m: m["schedule"].update(initial_noise_scale=math.inf), r"noise_scale: .*finite"),
        (lambda m: m["files"].pop(GRAPH), "has no entry in files"),
        (lambda m: _weight(m).update(dtype="object"), r"dtype: Input should be"),
        (lambda m: _weight(m).update(shape=[-1]), "greater than or equal to 0"),
        (lambda m: _weight(m).update(shape=[2**40, 2**40]), "larger than any machine"),
        (lambda m: _weight(m).update(shape=[3]), r"float32 \[64\], the manifest says .* \[3\]"),
        (lambda m: _tensors(m).pop("proj_out.bias"), "differ in weight 'proj_out.bias'"),
        (lambda m: _weight(m).update(file=GRAPH), "is in no shard"),
        (lambda m: m.update(format_version="1"), "format_version is '1'"),
        (lambda m: _config(m).update(in_channels="x"), r"config\.in_channels: .*valid integer"),
        (lambda m: _config(m).update(in_channels=7), "in_channels = 7, the graph takes 16"),
        (lambda m: _config(m).pop("in_channels"), r"config\.in_channels: Field required"),
        (lambda m: _config(m).update(patch_size=2), r"config\.patch_size: .*valid array"),
        (lambda m: _config(m).update(patch_size=[1, 2]), r"patch_size: .*at least 3"),
        (lambda m: _config(m).update(patch_size=[1, 0, 2]), r"patch_size\.1: .*greater"),
        (lambda m: _config(m).update(rope_max_seq_len=None), r"rope_max_seq_len: .*integer"),
        (lambda m: _config(m).update(items=1), "'items' is no name of a setting"),
        (lambda m: _config(m).update({"a b": 1}), "'a b' is no name of a setting"),
        (lambda m: m.update(recipe=[]), "recipe: Input should be an object"),
        (lambda m: m["recipe"].update(generate=3), r"recipe\.generate: Input should be an object"),
        (lambda m: m["recipe"]["generate"].update(height="x"), r"generate\.height: .*integer"),
        (lambda m: m["recipe"]["generate"].update(fps=0), r"generate\.fps: .*greater than 0"),
        (lambda m: m["recipe"].update(description=[]), r"recipe\.description: .*string"),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    _edit(copy, change)
    with pytest.raises(BadInput, match=message) as caught:
        turbo_opt.load(copy)
    assert str(copy) in str(caught.value)


def test_further_keys_of_config_and_recipe_may_have_any_value(copy: Path) -> None:
    def extend(manifest: dict[str, Any]) -> None:
        _config(manifest)["window"] = [1, None]
        manifest["recipe"] |= {"calibration": {"rate": 1}, "generate": {"height": 16, "hue": "red"}}

    _edit(copy, extend)
    loaded = turbo_opt.load(copy)
    assert loaded.config["window"] == [1, None]
    assert clip_options(loaded.manifest).height == 16


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format_version": true}', "[" * 100000])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(BadInput, match=MANIFEST):
        turbo_opt.load(tmp_path)


@pytest.mark.parametrize(
    ("device", "message"),
    [("foo", "device 'foo': no such device"), ("cuda", "torch sees no CUDA GPU here; use 'cpu'")],
)
def test_a_device_that_is_not_here_is_named(copy, monkeypatch, device, message) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match=message):
        turbo_opt.load(copy, device=device)


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a turbo_opt artifact"):
        turbo_opt.load(tmp_path / "nothing")


class Bomb:
    """Unpickling this raises the flag."""

    fired = False

    def __reduce__(self) -> Any:
        return (setattr, (Bomb, "fired", True))


def test_pickled_members_of_a_graph_file_are_never_read(copy: Path) -> None:
    buffer = io.BytesIO()
    torch.save((Bomb(),), buffer)
    for name, content in (
        ("data/sample_inputs/model.pt", buffer.getvalue()),
        ("data/weights/model.pt", buffer.getvalue()),
        ("data/constants/model.pt", pickle.dumps(Bomb())),
        ("data/weights/weight_0", b"1234"),
    ):
        graph = _repack(copy / GRAPH, {name: content})
        with pytest.raises(BadInput, match=r"never read|does not belong|holds weights"):
            read_graph(graph)
    assert not Bomb.fired


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("torch.ops.aten.linear.default", "torch.serialization.os.system", "no operator"),
        ("torch.ops.aten.linear.default", "torch.ops.aten.from_file.default", "no operator"),
        ("torch.ops.aten.linear.default", "builtins.eval", "no operator"),
        ("_operator.mul", "_operator.methodcaller", "no operator"),
        ("Mul(Integer(2), ", "Mul(__import__('os').system('true'), ", "not an expression"),
        ("Mul(Integer(2), ", "Mul(eval('1'), ", "not an expression"),
        ("builtins.dict", "collections.defaultdict", "refused"),
    ],
)
def test_a_graph_that_would_run_other_code_is_refused(
    copy: Path, old: str, new: str, message: str
) -> None:
    with zipfile.ZipFile(copy / GRAPH) as archive:
        model = archive.read("archive/models/model.json").decode()
    assert old in model
    graph = _repack(copy / GRAPH, {"models/model.json": model.replace(old, new).encode()})
    with pytest.raises(BadInput, match=message):
        read_graph(graph)


@settings(FUZZ, max_examples=15)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_damaged_graph_file_is_bad_input_or_still_a_graph(
    copy: Path, position: int, value: int
) -> None:
    content = bytearray((copy / GRAPH).read_bytes())
    # The ends hold the structure; a hit in the middle is caught by the archive's checksum.
    content[-1 - position % 2000] = value
    (copy / "fuzzed.pt2").write_bytes(content[: len(content) - position % 7])
    _reads_or_bad_input(lambda: read_graph(copy / "fuzzed.pt2"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "F8_E4M3", "X"]) | JSON,
        "shape": st.lists(st.integers(-2, 2**33), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON,
    }
)


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON) | JSON,
    length=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=64),
)
def test_any_safetensors_file_is_read_within_its_bytes_or_refused(
    tmp_path: Path, header: Any, length: int | None, data: bytes
) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / f"fuzzed-{abs(hash((text, length, data)))}"
    prefix = (len(text) if length is None else length).to_bytes(8, "little")
    path.write_bytes(prefix + text + data)

    def read_all() -> None:
        file = SafetensorsFile(str(path))
        for key in file.keys():  # noqa: SIM118
            assert file.read(key).nbytes <= len(data)

    _reads_or_bad_input(read_all)
    path.unlink()


@FUZZ
@given(data=st.data())
def test_any_change_of_a_manifest_is_read_or_refused(copy: Path, data: st.DataObject) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    original = json.dumps(manifest)
    place = manifest
    for _ in range(data.draw(st.integers(0, 4))):
        inner = [key for key, value in place.items() if isinstance(value, dict) and value]
        if inner:
            place = place[data.draw(st.sampled_from(inner))]
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    _reads_or_bad_input(lambda: read_manifest(copy))
    (copy / MANIFEST).write_text(original)


def _reads_or_bad_input(read: Callable[[], Any]) -> None:
    with contextlib.suppress(BadInput):
        read()


def _tensors(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return manifest["denoisers"]["transformer"]["tensors"]  # type: ignore[no-any-return]


def _weight(manifest: dict[str, Any]) -> dict[str, Any]:
    return _tensors(manifest)["proj_out.bias"]


def _config(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["denoisers"]["transformer"]["config"]  # type: ignore[no-any-return]


def _edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


def _repack(graph: Path, changed: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(graph) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members |= {f"archive/{name}": content for name, content in changed.items()}
    out = graph.with_name("repacked.pt2")
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out
