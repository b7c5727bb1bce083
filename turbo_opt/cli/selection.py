"""Which recipe, and which of its passes: the arguments that `run`, `plan` and `bench` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from turbo_opt.errors import BadInput

if TYPE_CHECKING:
    from turbo_opt.compiler.validation import PlannedPass
    from turbo_opt.config.schema import Recipe

F = TypeVar("F", bound=Callable[..., Any])

_CHANGES = (
    click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE",
        help="Change a value of the recipe, such as generate.height=64. May be repeated.",
    ),
    click.option(
        "--disable-pass", "--disable", "disable", multiple=True, metavar="NAME",
        help="Leave a pass out. May be repeated.",
    ),
    click.option("--until", metavar="NAME", help="Stop after this pass: NAME, or NAME[1]."),
    click.option(
        "--passes", "pipeline", metavar="TEXT",
        help="Run these passes instead of the recipe's: 'canonicalize,fuse-norms{adaln=false}'.",
    ),
    click.option(
        "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Precision of what no pass quantizes, instead of the recipe's.",
    ),
)  # fmt: skip


def selection_options(function: F) -> F:
    """RECIPE and `change_options`."""
    return click.argument("recipe")(change_options(function))


def change_options(function: F) -> F:
    """`--set`, `--disable-pass`, `--until`, `--passes` and `--dtype`."""
    for option in reversed(_CHANGES):
        function = option(function)
    return function


def select_recipe(
    recipe: str,
    *,
    overrides: tuple[str, ...] = (),
    disable: tuple[str, ...] = (),
    until: str | None = None,
    pipeline: str | None = None,
    dtype: str | None = None,
) -> Recipe:
    """The recipe with the changes of the command line.

    Raises:
        BadInput: the recipe or a change is wrong, one line per fault.
    """
    from turbo_opt.compiler.pipeline import parse_pipeline
    from turbo_opt.config.loader import load_recipe
    from turbo_opt.config.overrides import cut_after, without

    if dtype is not None:
        overrides = (*overrides, f"model.dtype={dtype}")
    if pipeline is None:
        return load_recipe(recipe, overrides, disable, until)
    if any(text.strip().startswith("passes.") for text in overrides):
        raise BadInput("--set passes.… changes the recipe's passes, which --passes replaces")
    specs = parse_pipeline(pipeline)
    for name in disable:
        specs = without(specs, name)
    if until is not None:
        specs = cut_after(specs, until)
    return load_recipe(recipe, overrides).with_passes(specs)


def checked_pipeline(recipe: Recipe) -> list[PlannedPass]:
    """The recipe's passes, checked as a whole: names, options, order and target.

    Raises:
        BadInput: the first thing that is wrong.
    """
    from turbo_opt.compiler.validation import validate_pipeline
    from turbo_opt.targets import get_target

    return validate_pipeline(
        recipe.specs(), target=get_target(recipe.target), checkpoints=recipe.checkpoints()
    )


def demo_recipe_for(device: str) -> str:
    """The recipe that the demo shows: with the students of tiny-wan where there is one for this
    machine, else `tiny_recipe_for`."""
    from turbo_opt.config.lookup import list_recipes

    name = tiny_recipe_for(device)
    turbo = f"{name}-turbo"
    return turbo if any(info.name == turbo for info in list_recipes()) else name


def tiny_recipe_for(device: str) -> str:
    """The recipe of tiny-wan for the detected machine, or for a CPU.

    Args:
        device: `cpu` or `cuda`.
    """
    from turbo_opt.config.lookup import list_recipes
    from turbo_opt.targets import detect_target

    name = f"tiny-wan/{detect_target().name}" if device == "cuda" else "tiny-wan/cpu"
    return name if any(info.name == name for info in list_recipes()) else "tiny-wan/cpu"
