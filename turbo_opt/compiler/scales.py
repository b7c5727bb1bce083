"""What `turbo-opt calibrate scales` measured: the file that recipes refer to.

    quantize-linear{scales="scales.json" min_sqnr=30}

One JSON file for a model: for each network how far every linear layer and every self-attention is
off when it alone is quantized or made sparse, at several noise levels, and the channel scales that
would balance its operands. It holds for one architecture, and is refused by another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from turbo_opt.config.explain import explain, format_path
from turbo_opt.errors import BadInput, nearest
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.json_files import read_json
from turbo_opt.kernels.whole_file import write_whole

FORMAT = 1
LARGEST_EXPONENT = 16
MOST_BYTES = 64 * 2**20
Scheme = Annotated[str, Field(pattern="^(int8|fp8)-block$")]
Share = Annotated[float, Field(gt=0, le=1)]
ByLevel = Annotated[tuple[float, ...], Field(strict=False, min_length=1)]
"""A value for each noise level."""


class _Section(BaseModel):
    """Unknown keys are errors; every number is finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class InputStatistics(_Section):
    """The input of one linear layer, at each noise level."""

    amax: ByLevel = Field(description="largest magnitude")
    rms: ByLevel = Field(description="root mean square")
    outliers: ByLevel = Field(description="share of the values beyond six times the rms")
    kurtosis: ByLevel = Field(description="E[x⁴] / E[x²]²; 3 for Gaussian values")


class LinearScales(_Section):
    """One linear layer."""

    shape: tuple[int, int] = Field(strict=False, description="out_features, in_features")
    input: InputStatistics
    sqnr: dict[Scheme, ByLevel] = Field(
        description="dB of its output when it alone is quantized; a scheme whose block sizes do "
        "not divide the layer is missing"
    )
    prediction_sqnr: dict[Scheme, float] = Field(
        default_factory=dict, description="the same of the network's output, where it was measured"
    )


class AttentionScales(_Section):
    """One self-attention."""

    errors: tuple[ByLevel, ...] = Field(
        strict=False, description="‖sparse − dense‖ / ‖dense‖, for each of the network's `topk`"
    )
    prediction_errors: tuple[float, ...] = Field(
        (), strict=False, description="the same of the network's output; empty: not measured"
    )


class SharesTogether(_Section):
    """All self-attention layers sparse at once, on average as much as one of `topk`."""

    mean: Share
    shares: dict[str, Share] = Field(description="the best for the layers' single errors")
    error: float = Field(ge=0, description="‖sparse − dense‖ / ‖dense‖ of the prediction with them")
    uniform_error: float = Field(ge=0, description="the same with `mean` in every layer")


class BalancedLayers(_Section):
    """Linear layers that read the result of one norm, whose channels powers of two may divide."""

    layers: tuple[str, ...] = Field(strict=False, min_length=1)
    sqnr: dict[str, dict[Scheme, ByLevel]] = Field(
        description="as `LinearScales.sqnr`, with the division"
    )
    prediction_sqnr: dict[str, dict[Scheme, float]] = Field(
        default_factory=dict, description="as `LinearScales.prediction_sqnr`, with the division"
    )
    gain: dict[Scheme, float] = Field(
        description="by how many dB the relative noise of all of them together falls"
    )
    exponents: tuple[Annotated[int, Field(ge=-LARGEST_EXPONENT, le=LARGEST_EXPONENT)], ...] = Field(
        strict=False,
        description="channel j is divided by 2 to this power; empty where no scheme gains",
    )


class DenoiserScales(_Section):
    """One network."""

    architecture: dict[str, Any] = Field(description="its class and config")
    noise_levels: ByLevel
    topk: tuple[Share, ...] = Field(strict=False, min_length=1, description="in rising order")
    block_q: int
    block_k: int
    linear: dict[str, LinearScales]
    attention: dict[str, AttentionScales]
    together: tuple[SharesTogether, ...] = Field((), strict=False)
    balance: tuple[BalancedLayers, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if list(self.topk) != sorted(set(self.topk)):
            raise ValueError("topk must rise")
        for name, layer in self.attention.items():
            for errors in (layer.errors, layer.prediction_errors or self.topk):
                if len(errors) != len(self.topk):
                    raise ValueError(
                        f"{name} has errors of {len(errors)} topk, there are {len(self.topk)}"
                    )
        for group in self.balance:
            for name in group.layers:
                if name not in self.linear or name not in group.sqnr:
                    raise ValueError(f"balance names {name}, of which nothing else is said")
            widths = {self.linear[name].shape[1] for name in group.layers}
            if group.exponents and widths != {len(group.exponents)}:
                raise ValueError(
                    f"{group.layers[0]} has {len(group.exponents)} exponents and in_features "
                    f"{sorted(widths)}"
                )
        return self


class Scales(_Section):
    """The whole file."""

    format: Literal[1] = 1
    source: str = Field(description="the model it was measured on")
    clips: int = Field(ge=1, description="samples that the statistics are of")
    held_out: int = Field(ge=1, description="further samples that the errors were measured on")
    denoisers: dict[str, DenoiserScales]

    def of(self, denoiser: Denoiser, place: str) -> DenoiserScales:
        """What was measured on a network.

        Raises:
            BadInput: nothing was, or the network is of another architecture.
        """
        if denoiser.name not in self.denoisers:
            raise BadInput(
                f"{place}: was measured on {', '.join(self.denoisers)}, not on {denoiser.name}; "
                f"turbo-opt calibrate scales measures all networks of a model"
            )
        found = self.denoisers[denoiser.name]
        ours = architecture_of(denoiser.model_class, denoiser.config)
        # Configs of other diffusers releases lack keys that have a default.
        different = [
            f"{key} is {found.architecture[key]!r} there and {ours[key]!r} here"
            for key in sorted(ours.keys() & found.architecture.keys())
            if found.architecture[key] != ours[key]
        ]
        if different:
            raise BadInput(
                f"{place}: was measured on another architecture than this {denoiser.name}: "
                f"{'; '.join(different[:3])}; measure this model with turbo-opt calibrate scales"
            )
        return found


def architecture_of(model_class: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Class and config of a network, as JSON data."""
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    data: dict[str, Any] = json.loads(json.dumps({"class": model_class, **own}))
    return data


def scales_file(ref: str, checkpoints: Mapping[str, str]) -> Path:
    """The file that an option names: an entry of the recipe's `weights`, or a path.

    Raises:
        BadInput: there is none.
    """
    path = Path(checkpoints.get(ref, ref)).expanduser().absolute()
    if path.is_file():
        return path
    shown = f"{ref!r} ({checkpoints[ref]})" if ref in checkpoints else repr(ref)
    raise BadInput(
        f"no scales {shown}: neither a name in the recipe's `weights` "
        f"({', '.join(sorted(checkpoints)) or 'it has none'}) nor a file; turbo-opt calibrate "
        f"scales writes one{nearest(ref, checkpoints)}"
    )


def scales_identity(ref: str, checkpoints: Mapping[str, str]) -> str:
    """Digest of the file that an option names, once it was seen to be one.

    Raises:
        BadInput: as `scales_file` and `read_scales`.
    """
    path = scales_file(ref, checkpoints)
    read_scales(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_scales(path: Path) -> Scales:
    """The file at `path`.

    Raises:
        BadInput: it is none, one line per fault with the key.
    """
    if path.stat().st_size > MOST_BYTES:
        raise BadInput(f"{path}: {path.stat().st_size} bytes are too many for a file of scales")
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise BadInput(
            f"{path}: is no file of scales that this turbo_opt reads (format is "
            f"{data.get('format')!r}, not {FORMAT}); turbo-opt calibrate scales writes one"
        )
    try:
        return Scales.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{path}: {format_path(problem.path) or 'scales'}: {problem.message}"
            for problem in explain(Scales, error, data)
        ]
        raise BadInput("\n".join(lines[:5])) from None


def write_scales(scales: Scales, path: Path) -> None:
    """Write the file whole, in place of an older one."""
    write_whole(path, scales.model_dump_json() + "\n")


def measured_scales(
    ref: str, checkpoints: Mapping[str, str], program: Program
) -> dict[str, DenoiserScales]:
    """Network → what the file that an option names says of it.

    Raises:
        BadInput: there is no such file, it is damaged, or it is of another architecture.
    """
    path = scales_file(ref, checkpoints)
    scales = read_scales(path)
    return {denoiser.name: scales.of(denoiser, str(path)) for denoiser in program}
