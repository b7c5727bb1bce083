"""A folder of tar shards that no index names, by the convention of WebDataset.

Files of a shard whose base names are alike up to the first dot are one sample, and what follows the
dot says what each holds (github.com/webdataset/webdataset, "The WebDataset Format"):

    000001.safetensors          tensors `latents` (C, F, H, W) and `prompt_embeds` (T, text_dim)
    000001.latents.npy          or each in a file of its own; `.latent.npy` and `.embed.npy`
    000001.prompt_embeds.npy    are read alike
    000001.json                 {"caption": …, "text_length": …}: both may be left out
    000001.txt                  or its caption as text; `.prompt.txt` and `.caption.txt` too

Other files are passed over. Pickles (`.pth`, `.pt`, `.pkl` …) are never read: a sample whose
latents are one is broken. Headers are read once; what they say is kept in `shards.index.json`, if
the folder is writable, for as long as a shard's size and time of change stay the same.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from turbo_opt.calibration.data.formats import (
    LARGEST_SAMPLE,
    LATENTS,
    PROMPT_EMBEDS,
    parse_npy,
    parse_safetensors,
)
from turbo_opt.calibration.data.tars import members
from turbo_opt.errors import BadInput

CACHE = "shards.index.json"
_ARRAYS = {
    "latents.npy": LATENTS,
    "latent.npy": LATENTS,
    "prompt_embeds.npy": PROMPT_EMBEDS,
    "embed.npy": PROMPT_EMBEDS,
}
_CAPTIONS = ("txt", "caption.txt", "prompt.txt")
_RECORD = "json"
_PICKLES = {"pth", "pt", "ckpt", "pkl", "pickle", "pyd", "joblib"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_LONGEST_TEXT = 2**16
_MOST_POSITIONS = 2**16
_NEEDED = (
    "a sample needs latents and prompt_embeds, in .safetensors or in .latents.npy and "
    ".prompt_embeds.npy"
)
_NAMED = 3
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
_Count = Annotated[int, Field(ge=0)]
_Positions = Annotated[int, Field(ge=1, le=_MOST_POSITIONS)]


class _Record(BaseModel):
    """What is taken from a sample's .json."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    caption: str | None = None
    text_length: _Positions | None = None


class ShardSample(BaseModel):
    """One sample of a shard.

    Attributes:
        key: its files' name up to the first dot.
        files: ending → (first byte, number of bytes), of those that hold tensors.
        text_length: positions that its embeddings are padded to, if it says so.
        fault: why it cannot be used; empty if nothing speaks against it.
    """

    model_config = _STRICT
    key: str
    files: dict[str, tuple[_Count, _Count]]
    caption: str = ""
    text_length: _Positions | None = None
    fault: str = ""

    @model_validator(mode="after")
    def _can_be_read(self) -> ShardSample:
        if not all(map(_holds_tensors, self.files)):
            raise BadInput("has files that hold no tensors")
        size = sum(size for _, size in self.files.values())
        if size > LARGEST_SAMPLE:
            raise BadInput(f"has {size} bytes, more than {LARGEST_SAMPLE}")
        return self


class _Shard(BaseModel):
    model_config = _STRICT
    size: _Count
    modified: int  # nanoseconds
    samples: tuple[ShardSample, ...]

    @model_validator(mode="after")
    def _lies_within(self) -> _Shard:
        places = (place for sample in self.samples for place in sample.files.values())
        if any(start + size > self.size for start, size in places):
            raise BadInput("has files beyond its end")
        return self


class _Cache(BaseModel):
    model_config = _STRICT
    format: Literal[1]
    shards: dict[str, _Shard]


@dataclass(frozen=True)
class Shards:
    """The samples of a folder of shards: those of each in the order of its tar.

    Attributes:
        folder: of the shards.
        samples: (name of the shard, sample).
    """

    folder: Path
    samples: tuple[tuple[str, ShardSample], ...]

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Find what the shards hold.

        Raises:
            BadInput: there are none, they hold nothing, or one is damaged.
            OSError: one cannot be read.
        """
        paths = sorted(path for path in folder.glob("[!.]*.tar") if path.is_file())
        if not paths:
            raise BadInput(_none_found(folder))
        kept = _read_cache(folder)
        shards = {path.name: _scanned(path, kept.get(path.name)) for path in paths}
        if shards != kept:
            _write_cache(folder, shards)
        samples = [(name, sample) for name, shard in shards.items() for sample in shard.samples]
        if not samples:
            raise BadInput(f"{folder}: its shards hold no samples; {_NEEDED}")
        return cls(folder, tuple(samples))

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, number: int) -> str:
        """`shard.tar/key` of a sample."""
        shard, sample = self.samples[number]
        return f"{shard}/{sample.key}"

    def check(self, number: int) -> None:
        """Raise BadInput if a sample is known to be broken."""
        fault = self.samples[number][1].fault
        if fault:
            raise BadInput(fault)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """What a sample's files hold.

        Raises:
            BadInput, OSError: one cannot be read, or two hold the same.
        """
        self.check(number)
        shard, sample = self.samples[number]
        found: dict[str, Tensor] = {}
        with (self.folder / shard).open("rb") as file:
            for ending, place in sample.files.items():
                content = _content(file, place)
                array = _ARRAYS.get(ending)
                new = {array: parse_npy(content)} if array else parse_safetensors(content)
                if twice := found.keys() & new.keys():
                    raise BadInput(f"holds {sorted(twice)[0]!r} in two files")
                found |= new
        return found


def _holds_tensors(ending: str) -> bool:
    return ending in _ARRAYS or ending.rpartition(".")[2] == "safetensors"


def _scanned(path: Path, kept: _Shard | None) -> _Shard:
    """What a shard holds, by its headers; `kept` if that is still true."""
    state = path.stat()
    if kept is not None and (kept.size, kept.modified) == (state.st_size, state.st_mtime_ns):
        return kept
    by_key: dict[str, dict[str, tuple[int, int]]] = {}
    for raw, start, size in members(path):
        name = raw.encode("utf-8", "backslashreplace").decode()
        folder, slash, base = name.rpartition("/")
        stem, dot, ending = base.partition(".")
        about_shard = stem.startswith("__") and stem.endswith("__")
        if not stem or not dot or about_shard:
            continue
        files = by_key.setdefault(f"{folder}{slash}{stem}", {})
        if ending.lower() in files:
            raise BadInput(f"{path}: holds {name!r} twice")
        files[ending.lower()] = (start, size)
    with path.open("rb") as file:
        samples = tuple(_sample(file, key, files) for key, files in by_key.items())
    return _Shard(size=state.st_size, modified=state.st_mtime_ns, samples=samples)


def _sample(file: BinaryIO, key: str, files: Mapping[str, tuple[int, int]]) -> ShardSample:
    tensors = {ending: place for ending, place in files.items() if _holds_tensors(ending)}
    try:
        _check_whole(tensors, files)
        record = _record(file, files)
        caption = next((_text(file, files, each) for each in _CAPTIONS if each in files), None)
        return ShardSample(
            key=key,
            files=tensors,
            caption=record.caption or "" if caption is None else caption.strip(),
            text_length=record.text_length,
        )
    except BadInput as error:
        return ShardSample(key=key, files={}, fault=str(error))


def _check_whole(tensors: Mapping[str, tuple[int, int]], files: Iterable[str]) -> None:
    """Raise BadInput if a sample lacks latents or embeddings, as far as its files' names say."""
    held = {_ARRAYS.get(ending) for ending in tensors}
    if {LATENTS, PROMPT_EMBEDS} <= held or None in held:  # None: safetensors, which may hold both
        return
    pickles = [f".{ending}" for ending in files if ending.rpartition(".")[2] in _PICKLES]
    if pickles:
        raise BadInput(
            f"holds {' and '.join(pickles[:_NAMED])}: pickles, which can run code when they are "
            f"read, so they are not; {_NEEDED}"
        )
    named = ", ".join(f".{ending}" for ending in list(files)[:_NAMED])
    raise BadInput(f"holds only {named}; {_NEEDED}")


def _record(file: BinaryIO, files: Mapping[str, tuple[int, int]]) -> _Record:
    if _RECORD not in files:
        return _Record()
    try:
        return _Record.model_validate_json(_text(file, files, _RECORD))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadInput(": ".join([f".{_RECORD}", *map(str, first["loc"]), first["msg"]])) from None


def _text(file: BinaryIO, files: Mapping[str, tuple[int, int]], ending: str) -> str:
    place = files[ending]
    if place[1] > _LONGEST_TEXT:
        raise BadInput(f".{ending} has {place[1]} bytes, more than {_LONGEST_TEXT}")
    try:
        return _content(file, place).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f".{ending} is not UTF-8 text (byte {error.start})") from None


def _content(file: BinaryIO, place: tuple[int, int]) -> bytes:
    start, size = place
    file.seek(start)
    content = file.read(size)
    if len(content) != size:
        raise BadInput("is cut off")
    return content


def _none_found(folder: Path) -> str:
    packed = next((p.name for p in folder.iterdir() if p.name.endswith(_COMPRESSED)), None)
    if packed is not None:
        return (
            f"{folder}: {packed} is compressed, and samples are read from their places in a tar; "
            "unpack it to a .tar"
        )
    return (
        f"{folder}: has no index.json and no .tar shards; turbo-opt calibrate data makes a folder "
        "of samples"
    )


def _read_cache(folder: Path) -> dict[str, _Shard]:
    """What an earlier scan found; nothing if there was none, or it cannot be used."""
    with contextlib.suppress(OSError, ValidationError, BadInput):
        return _Cache.model_validate_json((folder / CACHE).read_bytes()).shards
    return {}


def _write_cache(folder: Path, shards: dict[str, _Shard]) -> None:
    """Keep what was found, if the folder may be written; several processes may do so at once."""
    temporary = folder / f".{CACHE}.{uuid.uuid4().hex}"
    content = _Cache(format=1, shards=shards).model_dump_json(exclude_defaults=True)
    with contextlib.suppress(OSError):
        try:
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(folder / CACHE)
        finally:
            temporary.unlink(missing_ok=True)
