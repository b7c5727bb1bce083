"""The recipe: what to compile, for which machine, by which passes, and how well it must match."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    WithJsonSchema,
    field_validator,
)

from turbo_opt.compiler.base import Numerics
from turbo_opt.compiler.pipeline import PassSpec
from turbo_opt.config.explain import format_path
from turbo_opt.embedded import embedded
from turbo_opt.errors import BadInput
from turbo_opt.targets import get_target

EMBEDDED_MODEL = "tiny-wan"
BITWISE: Literal["bitwise"] = "bitwise"
AUTO: Literal["auto"] = "auto"


class _Section(BaseModel):
    """Unknown keys are errors; text is never taken for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _read_pass(item: Any) -> PassSpec:
    shape = "must be a pass name, or a name with its options, like 'quantize-linear: {…}'"
    if isinstance(item, PassSpec):
        return item
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, Mapping):
        raise ValueError(f"{shape}, got {item!r}")
    optional = item.get("optional", False)
    if not isinstance(optional, bool):
        raise ValueError(f"'optional' must be true or false, got {optional!r}")
    names = [name for name in item if name != "optional"]
    if len(names) != 1:
        raise ValueError(f"{shape}, got {' and '.join(map(repr, names)) or 'no name'}")
    options = {} if item[names[0]] is None else item[names[0]]
    if not isinstance(options, Mapping):
        raise ValueError(f"options of {names[0]!r} must be a mapping, got {options!r}")
    try:
        return PassSpec(names[0], options, optional)
    except BadInput as error:
        raise ValueError(str(error)) from None


def write_pass(spec: PassSpec) -> str | dict[str, Any]:
    """One item of `passes`, in its shortest form."""
    if not spec.options and not spec.optional:
        return spec.name
    item: dict[str, Any] = {spec.name: dict(spec.options)}
    return {**item, "optional": True} if spec.optional else item


def _read_budget(value: Any) -> float | Literal["bitwise", "auto"] | None:
    if value is None or value in (BITWISE, AUTO):
        return value  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"must be decibels, {BITWISE!r}, {AUTO!r} or null, got {value!r}")
    return float(value)


PassItem = Annotated[
    PassSpec,
    PlainValidator(_read_pass),
    PlainSerializer(write_pass),
    WithJsonSchema({"type": ["string", "object"]}),
]
Budget = Annotated[
    float | Literal["bitwise", "auto"] | None,
    PlainValidator(_read_budget),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": [BITWISE, AUTO]}, {"type": "null"}]}),
]


class Model(_Section):
    """A checkpoint and the precision to compile it in."""

    source: str = Field(
        min_length=1,
        description="`tiny-wan`, the model inside the package; or a diffusers folder; or a hub id "
        "like `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`, from the local cache or downloaded.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16",
        description="Precision of weights and activations that no pass quantizes.",
    )


class Budgets(_Section):
    """The least agreement with the graph before a pass, as SQNR in dB.

    `bitwise` demands equality; `auto` allows what the result's dtype explains; null measures and
    reports, and never fails.
    """

    exact: Budget = Field(
        default=BITWISE, description="Budget of passes that must not change any bit."
    )
    reorders: Budget = Field(
        default=AUTO, description="Budget of passes that change float rounding only."
    )
    quantizes: Budget = Field(default=25.0, description="Budget of passes that lower precision.")
    retrained: Budget = Field(
        default=None, description="Budget of passes that change the function."
    )
    passes: dict[str, Budget] = Field(
        default_factory=dict, description="Budgets of single passes by name, before their tier's."
    )


class Verify(_Section):
    """How each pass is checked against the graph before it."""

    mode: Literal["all", "sample", "off"] = Field(
        default="all", description="Check every match of a pass, a tenth of them, or none."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the inputs of the checks.")
    budgets: Budgets = Field(default_factory=Budgets, description="The least SQNR per tier.")
    end_to_end: bool = Field(
        default=False,
        description="Also compare whole denoisers before and after; needs their memory.",
    )

    def budget(self, pass_name: str, tier: Numerics) -> float | None:
        """The least SQNR in dB of a pass: infinity for bitwise, minus infinity for no budget.

        None leaves it to the tier and the result's dtype.
        """
        budgets = self.budgets
        value = budgets.passes.get(pass_name, getattr(budgets, tier.value))
        if value is None:
            return -math.inf
        if value == AUTO:
            return None
        return math.inf if value == BITWISE else float(value)


class Generate(_Section):
    """Defaults of `turbo-opt generate`; compiled graphs take other sizes too."""

    height: int = Field(default=480, ge=16, description="Height in pixels.")
    width: int = Field(default=832, ge=16, description="Width in pixels.")
    num_frames: int = Field(default=81, ge=1, description="Frames of the clip; Wan takes 4n+1.")
    fps: float = Field(default=16.0, gt=0, description="Frames per second of the file written.")
    num_inference_steps: int = Field(default=50, ge=1, description="Steps of the sampler.")
    guidance_scale: float = Field(
        default=5.0,
        ge=0,
        description="Classifier-free guidance; 1 or less runs the network once a step.",
    )
    guidance_scale_2: float | None = Field(
        default=None,
        ge=0,
        description="Guidance of the low-noise expert; null takes `guidance_scale`.",
    )
    flow_shift: float | None = Field(
        default=None,
        gt=0,
        description="Shift of the flow schedule; null keeps the checkpoint's own.",
    )
    negative_prompt: str = Field(default="", description="What guidance steers away from.")
    max_sequence_length: int = Field(default=512, ge=1, description="Prompt length in text tokens.")


@dataclass(frozen=True)
class _Folders:
    """Folder of the file that each path was written in; takes no part in equality."""

    by_key: Mapping[str, Path] = field(default_factory=dict, compare=False)


class Recipe(_Section):
    """A recipe for turbo_opt."""

    schema_version: Literal[1] = Field(description="Version of this format: 1.")
    extends: str | None = Field(
        default=None,
        description="Recipe to start from: a name, or a `.yaml` path relative to this file. "
        "Mappings merge key by key; `passes` and all other values replace.",
    )
    description: str = Field(default="", description="One sentence for `turbo-opt recipes list`.")
    model: Model = Field(description="The checkpoint to compile.")
    target: str = Field(
        description="Machine to compile for: `cpu`, a GPU such as `h200`, or `smXY` for any other."
    )
    weights: dict[str, str] = Field(
        default_factory=dict,
        description="Further checkpoints that passes name, such as a distilled student: "
        "name → file, folder or hub id.",
    )
    passes: tuple[PassItem, ...] = Field(
        strict=False,
        description="What to do, in this order: a pass name, or `name: {options}`, with "
        "`optional: true` beside it where matching nothing is fine.",
    )
    verify: Verify = Field(default_factory=Verify, description="How passes are checked.")
    generate: Generate = Field(default_factory=Generate, description="Defaults of generation.")

    _origin: _Folders = PrivateAttr(default_factory=_Folders)

    @field_validator("target")
    @classmethod
    def _target_is_known(cls, name: str) -> str:
        try:
            return get_target(name).name
        except BadInput as error:
            raise ValueError(str(error)) from None

    def specs(self) -> tuple[PassSpec, ...]:
        """The passes in order, with the places where they were written if read from a file."""
        return self.passes

    def with_passes(self, specs: Iterable[PassSpec]) -> Recipe:
        """This recipe with other passes."""
        return self.model_copy(update={"passes": tuple(specs)})

    def folder_of(self, key: str) -> Path:
        """What a relative path at `key` (`model.source`, `weights.student`) is relative to."""
        return self._origin.by_key.get(key, Path())

    def with_folders(self, by_key: Mapping[str, Path]) -> Recipe:
        """This recipe, knowing the folder of the file that each path in it was written in."""
        copy = self.model_copy()
        copy._origin = _Folders(by_key)
        return copy

    def model_folder(self) -> Path | None:
        """The diffusers folder that `model.source` means; None for `tiny-wan` and for a hub id.

        A source that starts with `/`, `./`, `../` or `~` is a path, relative to the file it is
        written in; any other is a folder if one of that name exists in the current directory.
        """
        source = self.model.source
        if source == EMBEDDED_MODEL:
            return None
        written = self._as_path(source, "model.source")
        if written is not None:
            return written.absolute()  # else `./a/b` would read `a/b`, which is a hub id
        return Path(source) if Path(source).is_dir() else None

    def checkpoints(self) -> dict[str, str]:
        """`weights` with every path made absolute; hub ids, and names of what lies inside the
        package, stay as they are.

        What is a path is told as for `model_folder`, but that files count too.
        """
        found = {}
        for name, source in self.weights.items():
            path = self._as_path(source, format_path(("weights", name)))
            if path is None and embedded(source) is None and Path(source).exists():
                path = Path(source)
            found[name] = source if path is None else str(path.absolute())
        return found

    def _as_path(self, source: str, key: str) -> Path | None:
        """`source` as a path, relative to the file that `key` was written in; None if it is not
        written like one."""
        if source.startswith(("/", "./", "../", "~")) or source in (".", ".."):
            return self.folder_of(key) / Path(source).expanduser()
        return None

    def canonical(self) -> dict[str, Any]:
        """All fields, defaults filled in, as plain JSON data that `model_validate` reads back.

        `extends` is left out: what it brought is in the other fields.
        """
        return self.model_dump(mode="json", exclude={"extends"})

    def digest(self) -> str:
        """SHA-256 in hex of all that can change the result: not of `description`."""
        content = {key: value for key, value in self.canonical().items() if key != "description"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()
