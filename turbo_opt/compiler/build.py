"""From a recipe to an optimized Program: capture, validate, run the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_opt.capture import capture
from turbo_opt.compiler.cache import PassCache, first_key
from turbo_opt.compiler.instruments import Instrument
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.validation import check_files, validate_pipeline
from turbo_opt.config.schema import Recipe
from turbo_opt.ir.program import Program
from turbo_opt.targets import get_target


@dataclass(frozen=True)
class Built:
    """The program as captured, and as optimized."""

    captured: Program
    optimized: Program


def build(
    recipe: Recipe,
    *,
    read_weights: bool = True,
    instruments: Sequence[Instrument] = (),
    cache_folder: Path | None = None,
    resume: bool = False,
    reproducer: Path | None = None,
    capturing: Callable[[str], None] = lambda _: None,
    check: Callable[[Program], None] = lambda _: None,
) -> Built:
    """Capture the recipe's model and run its passes.

    Args:
        read_weights: False plans only: the passes run on graphs and shapes, nothing is verified
            and no weight is read.
        cache_folder: where results of passes are kept for `resume`; None keeps none.
        capturing: told the name of each denoiser before it is traced.
        check: given the captured program before any pass runs; what it raises ends the build.

    Raises:
        BadInput, BudgetExceeded, PassFailed: see `PassManager.run` and `capture`.
    """
    pipeline = validate_pipeline(
        recipe.specs(), target=get_target(recipe.target), checkpoints=recipe.checkpoints()
    )
    check_files(pipeline)
    captured = capture_recipe(recipe, capturing)
    check(captured)
    verification = Verification("off")
    if read_weights:
        budgets = {
            item.spec.name: recipe.verify.budget(item.spec.name, item.pass_class.numerics)
            for item in pipeline
        }
        verification = Verification(recipe.verify.mode, recipe.verify.seed, budgets)
    manager = PassManager(
        pipeline,
        verification=verification,
        instruments=instruments,
        cache=PassCache(cache_folder) if cache_folder is not None and read_weights else None,
        resume=resume,
        reproducer=reproducer,
    )
    key = first_key(captured.digest()) if cache_folder is not None and read_weights else ""
    return Built(captured, manager.run(captured, key))


def capture_recipe(recipe: Recipe, capturing: Callable[[str], None] = lambda _: None) -> Program:
    """The recipe's model as captured, with the sampling loop of its `generate` defaults."""
    folder, settings = recipe.model_folder(), recipe.generate
    return capture(
        str(folder) if folder is not None else recipe.model.source,
        dtype=recipe.model.dtype,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        guidance_scale_2=settings.guidance_scale_2,
        flow_shift=settings.flow_shift,
        progress=capturing,
    )
