"""`manifest.json`: its fields, and the checks that make an untrusted one safe to follow."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Required

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict

import turbo_opt
from turbo_opt.errors import BadInput
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.weights import dtype_from_name

FORMAT_VERSION: Final = 2
"""The format that `save` writes; 2 added `stages`. Every released format stays loadable."""
MANIFEST = "manifest.json"
_MAX_BYTES = 64 * 2**20
_MAX_TENSOR_BYTES = 2**44
_PLAIN_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

DType = Literal[
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "int64", "int32", "int16", "int8", "uint8", "bool",
]  # fmt: skip
Size = Annotated[int, Field(ge=0, le=2**48)]
Count = Annotated[int, Field(ge=1, le=2**31)]


def _plain_path(path: str) -> str:
    if not all(_PLAIN_PART.fullmatch(part) for part in path.split("/")):
        raise ValueError(
            f"{path!r} is not a plain relative path inside the artifact, like 'denoisers/x.pt2'"
        )
    return path


PlainPath = Annotated[str, AfterValidator(_plain_path)]
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
StageName = Annotated[str, Field(pattern=r"^(prompt|timestep)$")]


def _names_of_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Diffusers makes attributes of a config's keys, so they must be names, and free ones."""
    for name in config:
        if not name.isidentifier() or hasattr(dict, name) or name.startswith("__"):
            raise ValueError(f"{name!r} is no name of a setting")
    return config


@with_config(ConfigDict(extra="allow", strict=True))
class NetworkConfig(TypedDict, total=False):
    """What is read of a network's diffusers config; further keys may have any value."""

    in_channels: Required[Count]
    patch_size: Required[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    rope_max_seq_len: Count
    text_dim: Count


@with_config(ConfigDict(extra="allow", strict=True))
class ClipDefaults(TypedDict, total=False):
    """What is read of a recipe's `generate`; see `turbo_opt.runtime.generate.ClipOptions`."""

    height: Count | None
    width: Count | None
    num_frames: Count | None
    fps: Annotated[FiniteFloat, Field(gt=0)] | None
    negative_prompt: str | None
    max_sequence_length: Count | None


@with_config(ConfigDict(extra="allow", strict=True))
class RecipeRecord(TypedDict, total=False):
    """What is read of the resolved recipe; the rest of it is only shown."""

    description: str | None
    generate: ClipDefaults | None


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Record):
    """Digest and size of one file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: Size


class TensorRecord(_Record):
    """Where one weight lies, and what it is."""

    file: PlainPath
    dtype: DType
    shape: tuple[Size, ...] = Field(max_length=16)

    @model_validator(mode="after")
    def _bounded(self) -> TensorRecord:
        if math.prod(self.shape) * dtype_from_name(self.dtype).itemsize > _MAX_TENSOR_BYTES:
            raise ValueError(f"a tensor of shape {list(self.shape)} is larger than any machine")
        return self


class ReplayRecord(_Record):
    """The stored input and output of one denoiser, or why there is none.

    Attributes:
        min_sqnr_db: how close another machine must come.
        fingerprint: of the environment that computed it; the same one must agree bit for bit.
    """

    file: PlainPath | None
    reason: str = ""
    min_sqnr_db: float = 0.0
    fingerprint: str = ""


class DenoiserRecord(_Record):
    """One network: graph, weights and what it was captured from.

    Attributes:
        stages: stage → the inputs that define it; see `turbo_opt.ir.stages`.
    """

    model_class: str
    config: Annotated[NetworkConfig, AfterValidator(_names_of_settings)]
    dtype: DType
    graph: PlainPath
    shards: tuple[PlainPath, ...]
    tensors: dict[str, TensorRecord]
    replay: ReplayRecord
    stages: dict[StageName, tuple[PlainName, ...]] = {}


class StepRecord(_Record):
    """One step of the sampling loop; see `turbo_opt.ir.schedule.Step`."""

    time: FiniteFloat
    next_time: FiniteFloat
    timestep: FiniteFloat
    denoiser: PlainName
    guidance_scale: FiniteFloat | None
    rule: Literal["scheduler", "euler", "rcm-sde", "rcm-ode"]


class ScheduleRecord(_Record):
    """The sampling loop; see `turbo_opt.ir.schedule.Schedule`."""

    steps: tuple[StepRecord, ...] = Field(min_length=1)
    scheduler: dict[str, Any]
    initial_noise_scale: FiniteFloat
    expand_timesteps: bool

    def build(self) -> Schedule:
        """As the schedule that the sampler follows."""
        return Schedule.from_json(self.model_dump())


class ComponentsRecord(_Record):
    """The diffusers folder with text encoder, tokenizer, VAE and scheduler.

    Attributes:
        source: what the user named: `tiny-wan`, a folder, or a hub id.
        found_at: the absolute folder at the time of saving, where `source` is a folder.
    """

    source: str
    found_at: str | None
    pipeline_class: str
    folders: dict[str, tuple[str, str]]
    pipeline_config: dict[str, Any]


class Manifest(_Record):
    """Everything in an artifact that is not a graph, a weight or a report."""

    format_version: Literal[1, 2]
    files: dict[PlainPath, FileRecord]
    denoisers: dict[PlainName, DenoiserRecord] = Field(min_length=1)
    schedule: ScheduleRecord
    components: ComponentsRecord
    facts: tuple[str, ...]
    recipe: RecipeRecord
    history: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    target: str | None
    kernels: dict[str, Any]

    @model_validator(mode="after")
    def _refers_to_its_own_files(self) -> Manifest:
        if MANIFEST in self.files:
            raise ValueError("files: the manifest cannot hold its own digest")
        for name, record in self.denoisers.items():
            named = [record.graph, *record.shards, *filter(None, [record.replay.file])]
            for path in named:
                if path not in self.files:
                    raise ValueError(f"denoisers.{name}: {path!r} has no entry in files")
            for weight, tensor in record.tensors.items():
                if tensor.file not in record.shards:
                    raise ValueError(f"denoisers.{name}: weight {weight!r} is in no shard")
        for step in self.schedule.steps:
            if step.denoiser not in self.denoisers:
                raise ValueError(f"schedule: no denoiser {step.denoiser!r}")
        return self

    @property
    def config(self) -> NetworkConfig:
        """The diffusers config of the first denoiser, or the only one."""
        return self.denoisers[min(self.denoisers)].config

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def read_manifest(root: Path) -> Manifest:
    """The checked manifest of the artifact at `root`.

    Raises:
        BadInput: no artifact is there, it is of a newer format, or its manifest is wrong.
    """
    path = root / MANIFEST
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadInput(f"{path}: larger than any manifest ({path.stat().st_size} bytes)")
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(
            f"{root}: not a turbo_opt artifact ({MANIFEST} cannot be read: {error.strerror})"
        ) from None
    _check_version(path, text)
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise BadInput(f"{path}: {_describe(error)}") from None


def is_artifact(root: Path) -> bool:
    """`root` holds a valid manifest."""
    try:
        read_manifest(root)
    except BadInput:
        return False
    return True


def inside(root: Path, path: str) -> Path:
    """The file `path` of the artifact at `root`.

    Raises:
        BadInput: it is missing, is no regular file, or a link leads out of the artifact.
    """
    full = root / _plain_path(path)
    base = os.path.realpath(root)
    real = os.path.realpath(full)
    if os.path.commonpath([base, real]) != base:
        raise BadInput(
            f"{full}: a link that leads out of the artifact, to {real}; copy the artifact with "
            "its files (cp -rL)"
        )
    if not os.path.isfile(real):
        raise BadInput(f"{full}: missing from the artifact")
    return full


def check_sizes(root: Path, manifest: Manifest) -> None:
    """Every file is there and as long as the manifest says.

    Raises:
        BadInput: one is not; the message names it.
    """
    for path, record in manifest.files.items():
        size = inside(root, path).stat().st_size
        if size != record.bytes:
            raise BadInput(f"{root / path}: {size} bytes, the manifest says {record.bytes}")


def jsonable(value: Any) -> Any:
    """`value` with nothing in it that JSON cannot hold: infinities become text, NaN null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(value)


def _check_version(path: Path, text: bytes) -> None:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON ({error})") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is not int or version < 1:
        raise BadInput(f"{path}: not a turbo_opt manifest (format_version is {version!r})")
    if version > FORMAT_VERSION:
        environment = raw.get("environment")
        writer = environment.get("turbo_opt") if isinstance(environment, dict) else None
        raise BadInput(
            f"{path}: artifact format {version}, written by turbo_opt {writer or '(unknown)'}; "
            f"turbo_opt {turbo_opt.__version__} reads formats up to {FORMAT_VERSION}: "
            "upgrade turbo_opt"
        )


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"])) or "manifest"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {first['msg'].removeprefix('Value error, ')}{more}"
