"""The clip that a recipe asks for, in the model's own terms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbo_opt.errors import BadInput

if TYPE_CHECKING:
    from turbo_opt.config.schema import Recipe
    from turbo_opt.ir.program import Program
    from turbo_opt.runtime.limits import Granularity


def check_clip_size(recipe: Recipe, program: Program) -> None:
    """The recipe's `generate` defaults are a size that the captured model takes.

    Raises:
        BadInput: they are not; the message names the value and the nearest legal ones.
    """
    from turbo_opt.runtime.limits import LatentLimits, check_size, latent_limits

    grain = granularity(program)
    if grain is None:
        return
    settings = recipe.generate
    limits = LatentLimits.smallest([latent_limits(item.exported, item.config) for item in program])
    try:
        check_size(settings.height, settings.width, settings.num_frames, grain, limits)
    except BadInput as error:
        raise BadInput(f"generate.{error}") from None


def granularity(program: Program) -> Granularity | None:
    """How pixels map to latents; None where the model's folder has no VAE to tell."""
    from turbo_opt.capture.folder import find_source
    from turbo_opt.runtime.limits import Granularity

    vae = find_source(program.components.source) / "vae"
    if not (vae / "config.json").is_file():
        return None
    return Granularity.of(vae, next(iter(program)).config)


def latent_shape(recipe: Recipe, grain: Granularity) -> tuple[int, int, int]:
    """Latent frames, height and width of the recipe's clip."""
    settings = recipe.generate
    frames = (settings.num_frames - 1) // grain.temporal + 1
    return frames, settings.height // grain.spatial, settings.width // grain.spatial
