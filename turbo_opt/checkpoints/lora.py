"""LoRA files: which weights they change, and by how much.

    W ← W + s·(alpha / rank)·B·A           A (rank, in), B (out, rank)

Layouts, told apart name by name: diffusers' and PEFT's (`lora_A`, `lora_B`, alpha in the adapter's
config), kohya's (`lora_unet_…`, with `_` for every dot, `lora_down`, `lora_up`, `alpha`), and those
with the names of the original Wan (`diffusion_model.blocks…`), which may also hold whole changes:
`diff` of a weight, `diff_b` of a bias, `diff_m` of a modulation. Without an alpha, alpha = rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo_opt.checkpoints.names import original_name, without_prefix
from turbo_opt.checkpoints.places import adapter_config
from turbo_opt.checkpoints.reader import listed, stored_tensors
from turbo_opt.errors import BadInput, nearest
from turbo_opt.ir.transforms import plus_low_rank, plus_scaled
from turbo_opt.ir.weights import LazyTensor
from turbo_opt.json_files import read_json

_PART = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<down>lora_A|lora_down|lora\.down)(?:\.(?!weight$)\w+)?(?:\.weight)?"
    r"|(?P<up>lora_B|lora_up|lora\.up)(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"
    r"|(?P<up_bias>lora_B|lora_up)(?:\.(?!bias$)\w+)?\.bias"
    r"|(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b)|(?P<diff_m>diff_m))"
)
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
_EXPERTS = ("transformer_2", "transformer")
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Change:
    """What a LoRA adds to one weight: scale·up·down, or scale·up where there is no `down`."""

    up: LazyTensor
    down: LazyTensor | None
    scale: float

    def added_to(self, base: LazyTensor, strength: float) -> LazyTensor:
        """base + strength·change, for a base in float32."""
        if self.down is None:
            return plus_scaled(base, self.up, strength * self.scale)
        return plus_low_rank(base, self.up, self.down, strength * self.scale)


def read_lora(
    place: Path, denoiser: str, shapes: Mapping[str, tuple[int, ...]], alone: bool
) -> dict[str, list[Change]]:
    """Weight → what the LoRA in `place` adds to it.

    Args:
        shapes: the denoiser's learned weights under diffusers' names.
        alone: the file is for this denoiser; else its names say which expert they are for.

    Raises:
        BadInput: a name or a shape fits no weight, a part is missing, or it is no LoRA of this
            kind; the names in question are told.
    """
    metadata: dict[str, str] = {}
    tensors = _of_expert(place, dict(stored_tensors(place, metadata)), denoiser, alone)
    adapter = _Adapter(place, metadata, denoiser)
    changes: dict[str, list[Change]] = {}
    for module, parts in _by_module(place, tensors, shapes).items():
        weight = module if module in shapes else f"{module}.weight"
        for name, change in _changes(place, module, weight, parts, adapter):
            if name not in shapes:
                raise BadInput(f"{place}: changes {name!r}, which the model has not")
            _check_shape(place, name, change, shapes[name])
            changes.setdefault(name, []).append(change)
    return changes


def _of_expert(
    place: Path, tensors: dict[str, LazyTensor], denoiser: str, alone: bool
) -> dict[str, LazyTensor]:
    """The tensors that are for one network of a pair of experts."""
    experts = {key: _expert(key) for key in tensors}
    if alone:
        if len(set(experts.values()) & set(_EXPERTS)) > 1:
            raise BadInput(f"{place}: is for two experts, {' and '.join(sorted(_EXPERTS))}")
        return tensors
    unsaid = [key for key, expert in experts.items() if expert is None]
    if unsaid:
        raise BadInput(
            f"{place}: does not say which expert it is for ({listed(unsaid)}); name a file for "
            "each, like {transformer=… transformer_2=…}"
        )
    return {key: tensor for key, tensor in tensors.items() if experts[key] == denoiser}


def _expert(key: str) -> str | None:
    return next((name for name in _EXPERTS if key.startswith(f"{name}.")), None)


def _by_module(
    place: Path, tensors: Mapping[str, LazyTensor], weights: Collection[str]
) -> dict[str, dict[str, LazyTensor]]:
    """Module in diffusers' names → part (`up`, `down`, `alpha`, …) → tensor."""
    modules = _module_names(weights)
    found: dict[str, dict[str, LazyTensor]] = {}
    unknown: dict[str, str] = {}
    for key, tensor in tensors.items():
        match = _PART.fullmatch(without_prefix(key))
        part = match.lastgroup if match else None
        written = match["module"] if match else without_prefix(key)
        for prefix in _FLAT_PREFIXES:
            written = written.removeprefix(prefix)
        module = modules.get(f"{written}.modulation" if part == "diff_m" else written)
        if part is None or module is None:
            unknown[key] = written
        elif found.setdefault(module, {}).setdefault(part, tensor) is not tensor:
            raise BadInput(f"{place}: {key!r} is a second {part!r} of {module!r}")
    if unknown:
        raise BadInput(
            f"{place}: {len(unknown)} of {len(tensors)} names are of no LoRA of this model: "
            f"{listed(unknown)}{nearest(unknown[min(unknown)], modules)}"
        )
    return found


def _module_names(weights: Collection[str]) -> dict[str, str]:
    """Every name that a LoRA may have for a module → diffusers' name of it."""
    names = {}
    for weight in weights:
        for written in (weight, original_name(weight)):
            if written is not None:
                module = _module(written)
                names[module] = names[module.replace(".", "_")] = _module(weight)
    return names


def _module(weight: str) -> str:
    return weight.removesuffix(".weight").removesuffix(".bias")


def _changes(
    place: Path, module: str, weight: str, parts: Mapping[str, LazyTensor], adapter: _Adapter
) -> Iterator[tuple[str, Change]]:
    """(weight, change) of everything that a LoRA says of one module."""
    scale = 1.0
    if "up" in parts or "down" in parts:
        for part in {"up", "down"} - parts.keys():
            raise BadInput(
                f"{place}: {module!r} has no {part} matrix (lora_A or lora_B is missing)"
            )
        rank = parts["down"].shape[0] if parts["down"].shape else 0
        if not rank or parts["up"].shape[1:2] != (rank,):
            raise BadInput(
                f"{place}: of {module!r}, A is {list(parts['down'].shape)} and B is "
                f"{list(parts['up'].shape)}: they share no rank"
            )
        scale = adapter.scale(module, rank, parts.get("alpha"))
        yield weight, Change(parts["up"], parts["down"], scale)
    elif "alpha" in parts or "up_bias" in parts:
        raise BadInput(f"{place}: {module!r} has neither lora_A nor lora_B")
    if "up_bias" in parts:
        yield f"{module}.bias", Change(parts["up_bias"], None, scale)
    if "diff" in parts:
        yield weight, Change(parts["diff"], None, 1.0)
    if "diff_b" in parts:
        yield f"{module}.bias", Change(parts["diff_b"], None, 1.0)
    if "diff_m" in parts:
        yield weight, Change(parts["diff_m"], None, 1.0)


def _check_shape(place: Path, name: str, change: Change, shape: tuple[int, ...]) -> None:
    found: tuple[int, ...] = change.up.shape
    fits = found == shape
    if change.down is not None:
        found = (change.up.shape[0], math.prod(change.down.shape[1:]))
        ones = math.prod(change.up.shape[2:]) == 1
        fits = ones and found == (shape[0], math.prod(shape[1:]))
    if not fits:
        raise BadInput(
            f"{place}: changes {name!r} by {list(found)}, the model's is {list(shape)}; it is for "
            "another model"
        )


class _Adapter:
    """What the file, or PEFT's config beside it, says about scales."""

    def __init__(self, place: Path, metadata: Mapping[str, str], denoiser: str) -> None:
        self._place = place
        settings = _stated_settings(place, metadata)
        prefixed = {
            key.removeprefix(f"{denoiser}."): value
            for key, value in settings.items()
            if key.startswith(f"{denoiser}.")
        }
        self._settings = prefixed or settings
        if self._settings.get("use_dora"):
            raise BadInput(f"{place}: is a DoRA, whose magnitudes are not merged; only LoRA is")

    def scale(self, module: str, rank: int, alpha: LazyTensor | None) -> float:
        """alpha / rank of one module, 1 where no alpha is stated; alpha / √rank for rsLoRA."""
        stated = self._alpha(module) if alpha is None else self._value(module, alpha)
        if stated is None:
            return 1.0
        stabilized = alpha is None and bool(self._settings.get("use_rslora"))
        return stated / (math.sqrt(rank) if stabilized else rank)

    def _alpha(self, module: str) -> float | None:
        """From the adapter's config; patterns in it name modules or their ends."""
        patterns = self._settings.get("alpha_pattern") or {}
        found = self._settings.get("lora_alpha")
        for name, value in patterns.items() if isinstance(patterns, dict) else ():
            if module == name or module.endswith(f".{name}"):
                found = value
        return None if found is None else self._checked(module, found)

    def _value(self, module: str, alpha: LazyTensor) -> float:
        if math.prod(alpha.shape) != 1:
            raise BadInput(f"{self._place}: alpha of {module!r} is no number: {list(alpha.shape)}")
        return self._checked(module, float(alpha.load().item()))

    def _checked(self, module: str, alpha: Any) -> float:
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not number or not math.isfinite(alpha):
            raise BadInput(f"{self._place}: alpha of {module!r} must be a number, it is {alpha!r}")
        return float(alpha)


def _stated_settings(place: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """Diffusers' metadata in the file, else PEFT's config beside it."""
    if _METADATA in metadata:
        try:
            settings = json.loads(metadata[_METADATA])
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise BadInput(f"{place}: its metadata {_METADATA!r} is no JSON object")
        return settings
    config = adapter_config(place)
    return {} if config is None else read_json(config)
