"""Folders of WebDataset's shards: found by their tars' headers alone, and never trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests.calibration.conftest import LATENTS, TEXT_DIM, TEXT_LENGTH
from turbo_opt.calibration.data import shards as module
from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.errors import BadInput

CACHE = "shards.index.json"


def clip(seed: int, positions: int = TEXT_LENGTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(LATENTS, generator=generator),
        "prompt_embeds": torch.randn(positions, TEXT_DIM, generator=generator),
    }


def npy(tensor: torch.Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, tensor.numpy())
    return file.getvalue()


def write_shard(path: Path, *files: tuple[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def whole(key: str, seed: int = 0) -> tuple[str, bytes]:
    return f"{key}.safetensors", save(clip(seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of two samples each, in three ways of storing one."""
    apart = clip(2)
    write_shard(
        tmp_path / "set" / "train-0.tar",
        whole("clips/000000", 0),
        ("clips/000000.json", b'{"caption": "a red circle", "fps": 16}'),
        ("clips/000001.safetensors", save(clip(1))),
        ("clips/000001.txt", b" a blue square\n"),
    )
    write_shard(
        tmp_path / "set" / "train-1.tar",
        ("000000.latents.npy", npy(apart["latents"])),
        ("000001.LATENT.npy", npy(clip(3)["latents"])),  # files of a sample need not be neighbours
        ("000000.prompt_embeds.npy", npy(apart["prompt_embeds"])),
        ("000000.prompt.txt", "ein grüner Kreis".encode()),
        ("000000.mp4", b"passed over"),
        ("000001.embed.npy", npy(clip(3)["prompt_embeds"])),
        ("000001.metadata.pkl", b"passed over too"),
        (".hidden", b""),
        ("__about__.json", b"of the shard"),
        ("LICENSE", b""),
    )
    return tmp_path / "set"


def test_a_caption_of_null_is_none(tmp_path: Path) -> None:
    write_shard(tmp_path / "set" / "0.tar", whole("1"), ("1.json", b'{"caption": null}'))
    assert SampleSet.open(tmp_path / "set").index.samples[0].caption == ""


def test_samples_come_back_in_the_order_of_their_shards(folder: Path) -> None:
    samples = SampleSet.open(folder)
    assert [record.file for record in samples.index.samples] == [
        "train-0.tar/clips/000000",
        "train-0.tar/clips/000001",
        "train-1.tar/000000",
        "train-1.tar/000001",
    ]
    captions = ["a red circle", "a blue square", "ein grüner Kreis", ""]
    assert [record.caption for record in samples.index.samples] == captions
    index = samples.index
    assert (index.latents, index.text_length, index.text_dim) == (LATENTS, TEXT_LENGTH, TEXT_DIM)
    for number in range(4):
        sample = samples.read(number)
        assert sample is not None and sample.name == index.samples[number].file
        assert torch.equal(sample.latents, clip(number)["latents"])
        assert torch.equal(sample.prompt_embeds, clip(number)["prompt_embeds"])


def test_a_sample_that_names_its_text_length_is_padded_to_it(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.tar",
        ("0.safetensors", save(clip(0, positions=3))),
        ("0.json", b'{"text_length": 7}'),
        ("1.safetensors", save(clip(1, positions=8))),
    )
    samples = SampleSet.open(tmp_path, broken_share=0.5)
    first = samples.read(0)
    assert first is not None and first.prompt_embeds.shape == (7, TEXT_DIM)
    assert not first.prompt_embeds[3:].any() and samples.read(1) is None
    assert samples.broken[1] == "prompt_embeds has 8 positions, the set's text_length is 7"


def test_without_one_all_are_padded_like_the_first(tmp_path: Path) -> None:
    files = [(f"{n}.safetensors", save(clip(n, positions=n))) for n in (5, 2)]
    write_shard(tmp_path / "a.tar", *files)
    second = SampleSet.open(tmp_path).read(1)
    assert second is not None and second.prompt_embeds.shape == (5, TEXT_DIM)


PICKLE = pickle.dumps({"latents": 0})
PARTS = clip(0)
LATENT_FILE = ("1.latents.npy", npy(PARTS["latents"]))
EMBED_FILE = ("1.prompt_embeds.npy", npy(PARTS["prompt_embeds"]))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            [("1.latent.pth", PICKLE), ("1.embed.pth", PICKLE), ("1.prompt.txt", b"a circle")],
            r"holds \.latent\.pth and \.embed\.pth: pickles, which can run code",
        ),
        ([LATENT_FILE, ("1.embed.pt", PICKLE)], r"holds \.embed\.pt: pickles"),
        ([LATENT_FILE], r"holds only \.latents\.npy; a sample needs latents and prompt_embeds"),
        ([("1.mp4", b"")], r"holds only \.mp4; a sample needs"),
        ([("1.safetensors", save({"latents": PARTS["latents"]}))], "has no 'prompt_embeds', only"),
        ([whole("1"), LATENT_FILE], "holds 'latents' in two files"),
        ([LATENT_FILE, EMBED_FILE, ("1.embed.npy", EMBED_FILE[1])], "'prompt_embeds' in two files"),
        ([("1.safetensors", PICKLE)], "is no safetensors file"),
        ([("1.latents.npy", PICKLE), EMBED_FILE], "is no .npy file"),
        ([("1.latents.npy", npy(torch.zeros(1, *LATENTS))), EMBED_FILE], "1×16×2×16×16, must be"),
        ([whole("1"), ("1.json", b"{")], r"\.json: Invalid JSON: EOF"),
        ([whole("1"), ("1.json", b"[" * 50_000)], r"\.json: Invalid JSON: recursion limit"),
        ([whole("1"), ("1.json", b"[]")], r"\.json: Input should be an object"),
        ([whole("1"), ("1.json", b'{"caption": 3}')], r"\.json: caption: Input should be a valid"),
        ([whole("1"), ("1.json", b'{"caption": "\\ud800"}')], r"\.json: Invalid JSON: "),
        ([whole("1"), ("1.json", b'{"text_length": 0}')], r"\.json: text_length: Input should be"),
        ([whole("1"), ("1.json", b'{"text_length": 1e9}')], r"\.json: text_length: Input should"),
        ([whole("1"), ("1.txt", b"\xff")], r"\.txt is not UTF-8 text \(byte 0\)"),
        ([whole("1"), ("1.txt", b" " * 70_000)], r"\.txt has 70000 bytes, more than 65536"),
    ],
)
def test_a_broken_sample_is_skipped_with_its_reason(tmp_path: Path, files, reason) -> None:
    write_shard(tmp_path / "a.tar", whole("0"), *files)
    for _ in range(2):  # scanned, and from what the scan left
        samples = SampleSet.open(tmp_path, broken_share=0.5)
        assert samples.read(0) is not None and samples.read(1) is None
        with pytest.raises(BadInput, match=reason):
            raise BadInput(samples.broken[1])


def test_a_sample_of_too_many_bytes_is_not_read(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "LARGEST_SAMPLE", len(save(clip(0))))
    with pytest.raises(BadInput, match=r"2 of 4 samples are broken.*bytes, more than"):
        SampleSet.open(folder)


def test_a_set_of_pickles_is_refused_by_name(tmp_path: Path) -> None:
    files = [(f"{n}.{what}.pth", PICKLE) for n in range(200) for what in ("latent", "embed")]
    write_shard(tmp_path / "a.tar", *files)
    message = r"none of its first 100 samples can be used \(a.tar/0: holds \.latent\.pth"
    with pytest.raises(BadInput, match=message):
        SampleSet.open(tmp_path)


def test_a_first_sample_that_is_broken_does_not_say_what_the_others_are_like(tmp_path) -> None:
    write_shard(tmp_path / "a.tar", ("0.pth", PICKLE), ("1.safetensors", b""), whole("2", 2))
    samples = SampleSet.open(tmp_path, broken_share=0.7)
    assert samples.index.latents == LATENTS and samples.read(2) is not None
    empty = {"latents": torch.zeros(1, 0, 2, 2), "prompt_embeds": torch.zeros(1, 1)}
    write_shard(tmp_path / "a.tar", ("0.safetensors", save(empty)))
    with pytest.raises(BadInput, match="latents or prompt_embeds are empty"):
        SampleSet.open(tmp_path, broken_share=0.5)


def test_links_and_names_that_lead_elsewhere_open_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(save(clip(5)))
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w") as archive:
        for kind, name in (
            (tarfile.SYMTYPE, "1.safetensors"),
            (tarfile.LNKTYPE, "2.safetensors"),
            (tarfile.FIFOTYPE, "3.safetensors"),
            (tarfile.DIRTYPE, "4.safetensors"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../secret.safetensors"
            archive.addfile(member)
        name, content = whole("../../escape", 1)
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    samples = SampleSet.open(tmp_path / "set")
    assert [record.file for record in samples.index.samples] == ["a.tar/../../escape"]
    sample = samples.read(0)
    assert sample is not None and torch.equal(sample.latents, clip(1)["latents"])
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"secret.safetensors", "set/a.tar", f"set/{CACHE}"}


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_shard_is_refused_by_name(folder: Path, share: float) -> None:
    path = folder / "train-1.tar"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BadInput, match=r"set/train-1.tar is .*cut off"):
        SampleSet.open(folder, broken_share=0.9)


def test_a_shard_cut_between_two_files_is_refused_too(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", whole("0"), whole("1"))
    with tarfile.open(path) as archive:
        second = archive.getmembers()[1].offset
    for cut in (second, second + 100):
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(BadInput, match=rf"a.tar is cut off or damaged at byte {second}"):
            SampleSet.open(tmp_path)


def with_size(header: bytes, size: int) -> bytes:
    """A tar's header that says another size, in binary, with the sum that goes with it."""
    said = bytearray(header)
    said[124:136] = (
        (size if size > 0 else size % 2**88) | (0x80 if size > 0 else 0xFF) << 88
    ).to_bytes(12)
    said[148:156] = b" " * 8
    said[148:156] = b"%06o\0 " % sum(said)
    return bytes(said)


@pytest.mark.parametrize("name", ["0.safetensors", f"{'long' * 40}.safetensors"])
@pytest.mark.parametrize("size", [-1, -512, -1024, 2**40, 2**63, 2**80])
def test_a_shard_that_says_impossible_sizes_is_refused_by_name(tmp_path, name, size) -> None:
    """Of a file, or of the name that lies before it."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo(name))
    content = path.read_bytes()
    path.write_bytes(with_size(content[:512], size) + content[512:])
    with pytest.raises(BadInput, match=r"a.tar is .*(cut off|damaged)"):
        SampleSet.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", b"not a tar" * 100, "a.tar is not an uncompressed tar"),
        ("a.tar", b"", "a.tar is not an uncompressed tar"),
        ("a.tar.gz", b"", "a.tar.gz is compressed"),
        ("._a.tar", b"", r"has no index.json and no .tar shards"),
    ],
)
def test_folders_without_a_shard_that_can_be_read(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        SampleSet.open(tmp_path)


def test_a_file_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", whole("0"), whole("0", 1))
    with pytest.raises(BadInput, match=r"a.tar: holds '0.safetensors' twice"):
        SampleSet.open(tmp_path)


def test_shards_without_a_sample_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", ("README", b""))
    with pytest.raises(BadInput, match="its shards hold no samples"):
        SampleSet.open(tmp_path)


def test_names_that_are_not_unicode_are_only_names(tmp_path: Path) -> None:
    name, content = whole("caf\udce9")
    write_shard(tmp_path / "a.tar", (name, content))
    for _ in range(2):
        assert SampleSet.open(tmp_path).name(0) == "a.tar/caf\\udce9"


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """Names of the shards whose headers are read."""
    seen: list[str] = []
    real = module.members
    monkeypatch.setattr(module, "members", lambda path: seen.append(path.name) or real(path))
    return seen


def test_headers_are_read_once_until_a_shard_changes(folder: Path, scans: list[str]) -> None:
    first = SampleSet.open(folder)
    assert scans == ["train-0.tar", "train-1.tar"]
    again = SampleSet.open(folder)
    assert len(scans) == 2 and again.index == first.index
    sample = again.read(2)
    assert sample is not None and torch.equal(sample.latents, clip(2)["latents"])
    write_shard(folder / "train-1.tar", whole("new", 9))
    (folder / "train-0.tar").rename(folder / "train-2.tar")
    changed = SampleSet.open(folder)
    assert scans[2:] == ["train-1.tar", "train-2.tar"] and len(changed) == 3
    assert changed.name(0) == "train-1.tar/new"
    assert json.loads((folder / CACHE).read_text())["shards"].keys() == {
        "train-1.tar",
        "train-2.tar",
    }


def beyond(said: dict) -> None:
    said["shards"]["train-0.tar"]["samples"][0]["files"]["safetensors"] = [10**9, 10**9]


def negative(said: dict) -> None:
    said["shards"]["train-0.tar"]["samples"][0]["files"]["safetensors"] = [-5, 10]


def a_pickle(said: dict) -> None:
    said["shards"]["train-0.tar"]["samples"][0]["files"]["pth"] = [0, 10]


def too_large(said: dict) -> None:
    shard = said["shards"]["train-0.tar"]
    shard["size"] = 2**40
    shard["samples"][0]["files"]["safetensors"] = [0, 2**35]


def another_format(said: dict) -> None:
    said["format"] = 2


@pytest.mark.parametrize("spoil", [beyond, negative, a_pickle, too_large, another_format])
def test_what_a_scan_left_is_not_trusted(folder: Path, scans: list[str], spoil) -> None:
    expected = SampleSet.open(folder).index
    said = json.loads((folder / CACHE).read_text())
    spoil(said)
    (folder / CACHE).write_text(json.dumps(said))
    assert SampleSet.open(folder).index == expected and len(scans) == 4
    assert SampleSet.open(folder).index == expected and len(scans) == 4


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_cache_is_replaced(folder: Path, scans: list[str], content: bytes) -> None:
    (folder / CACHE).write_bytes(content)
    SampleSet.open(folder)
    SampleSet.open(folder)
    assert len(scans) == 2


def test_a_folder_that_may_not_be_written_is_read(folder: Path, monkeypatch) -> None:
    def refused(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", refused)
    assert SampleSet.open(folder).read(0) is not None
    assert {path.name for path in folder.iterdir()} == {"train-0.tar", "train-1.tar"}


def test_a_shard_that_may_not_be_read_is_bad_input(folder: Path, monkeypatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "members", refused)
    with pytest.raises(BadInput, match=r"shards cannot be read .*Permission denied.*train-0.tar"):
        SampleSet.open(folder)


def test_a_shard_that_shrinks_after_the_scan_has_broken_samples(folder: Path) -> None:
    samples = SampleSet.open(folder, broken_share=1.0)
    os.truncate(folder / "train-0.tar", 2000)
    assert samples.read(1) is None and samples.broken == {1: "is cut off"}
    assert samples.read(2) is not None


def test_an_index_goes_before_shards(samples_folder) -> None:
    folder = samples_folder()
    write_shard(folder / "a.tar", whole("other"))
    assert len(SampleSet.open(folder)) == 8 and not (folder / CACHE).exists()
