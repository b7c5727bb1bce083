"""Measure every network of a recipe's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.fits import check_fits
from turbo_opt.calibration.flow import NoiseLevels, expert_range, flow_shift
from turbo_opt.calibration.networks import DenoiserFolder, open_denoiser
from turbo_opt.calibration.scales.evaluations import Measuring
from turbo_opt.calibration.scales.measure import measure_denoiser
from turbo_opt.capture.folder import open_pipeline
from turbo_opt.compiler.scales import Scales
from turbo_opt.compiler.validation import PlannedPass
from turbo_opt.config.schema import Recipe
from turbo_opt.errors import BadInput
from turbo_opt.passes.sparse_attention import SparseAttention, block_sizes
from turbo_opt.targets import get_target

Progress = Callable[[str, int, int], None]
"""Told (what, done, in all)."""


@dataclass(frozen=True)
class Amount:
    """How much is measured; see `Measuring`, and `SampleSet` for `broken_share`."""

    clips: int
    held_out: int
    noise_levels: int
    topk: Sequence[float]
    alpha: float
    probes: int
    seed: int
    broken_share: float = 0.0


def measure_recipe(
    recipe: Recipe,
    pipeline: Sequence[PlannedPass],
    data: Path,
    amount: Amount,
    device: torch.device,
    progress: Progress = lambda what, done, total: None,
) -> Scales:
    """What the file says of a recipe's model, as it is without the recipe's passes.

    Blocks of attention are those of the recipe's `sparse-attention`, or what that pass would take
    on the recipe's target.

    Args:
        pipeline: the recipe's passes, checked.
        data: a set of samples.

    Raises:
        BadInput: the model needs more than text, or the samples are too few or do not fit it.
    """
    place = recipe.model_folder()
    source = str(place) if place is not None else recipe.model.source
    folders = [open_denoiser(source, name) for name in open_pipeline(source).denoisers]
    samples = SampleSet.open(data, amount.broken_share, "--broken-share")
    if amount.clips + amount.held_out > len(samples.intact):
        raise BadInput(
            f"{data}: holds {len(samples.intact)} samples, --clips {amount.clips} and --held-out "
            f"{amount.held_out} take {amount.clips + amount.held_out}"
        )
    for folder in folders:
        check_fits(samples, folder)
    measuring = _measuring(recipe, pipeline, amount)
    found = {}
    for folder in folders:
        label = f"{folder.name}: " if len(folders) > 1 else ""
        found[folder.name] = measure_denoiser(
            folder,
            samples,
            noise_range(folder, recipe.generate.flow_shift),
            measuring,
            device,
            lambda what, done, total, label=label: progress(label + what, done, total),  # type: ignore[misc]
        )
    return Scales(
        source=recipe.model.source,
        clips=amount.clips,
        held_out=amount.held_out,
        denoisers=found,
    )


def noise_range(folder: DenoiserFolder, shift: float | None = None) -> NoiseLevels:
    """The noise levels that a denoiser is used at: all, or an expert's side of the boundary.

    Args:
        shift: of the flow; None: the model's own.
    """
    return NoiseLevels(shift or flow_shift(folder.pipeline.path), *expert_range(folder))


def _measuring(recipe: Recipe, pipeline: Sequence[PlannedPass], amount: Amount) -> Measuring:
    options = SparseAttention.Options()
    for item in pipeline:
        if isinstance(item.options, SparseAttention.Options):
            options = item.options
    block_q, block_k = block_sizes(options, get_target(recipe.target))
    return Measuring(
        clips=amount.clips,
        held_out=amount.held_out,
        noise_levels=amount.noise_levels,
        topk=tuple(sorted(set(amount.topk))),
        block_q=block_q,
        block_k=block_k,
        feature_map=options.feature_map,
        alpha=amount.alpha,
        probes=amount.probes,
        compute=torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16,
        seed=amount.seed,
    )
