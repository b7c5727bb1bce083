"""Is a pipeline in order? Asked before any work, and answered with what to move.

The user's order is kept: nothing is ever reordered or added silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from turbo_opt.checkpoints.places import WeightsNotGiven
from turbo_opt.compiler.base import Pass, PassOptions, get_pass, registered_passes
from turbo_opt.compiler.pipeline import PassSpec, validate_options
from turbo_opt.errors import BadInput
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Program
from turbo_opt.targets import Target


@dataclass(frozen=True)
class PlannedPass:
    """A pass of a checked pipeline: what was written, its class, typed options, target, and the
    recipe's `weights` by name."""

    spec: PassSpec
    pass_class: type[Pass]
    options: PassOptions
    target: Target | None = None
    checkpoints: Mapping[str, str] = field(default_factory=dict)


def validate_pipeline(
    specs: Sequence[PassSpec],
    *,
    target: Target | None = None,
    facts: frozenset[Fact] = frozenset(),
    checkpoints: Mapping[str, str] | None = None,
) -> list[PlannedPass]:
    """Check names, options, order and target of a whole pipeline.

    Args:
        facts: what holds before the first pass.
        checkpoints: the recipe's `weights`: name → path or hub id.

    Raises:
        BadInput: the first thing that is wrong, with the place it was written at and the remedy.
    """
    planned = []
    for position, spec in enumerate(specs):
        pass_class = _class_of(spec)
        options = validate_options(spec)
        _check_order(spec, pass_class, facts, specs[position + 1 :])
        objection = pass_class.objection_to(options, target) if target is not None else None
        if objection is not None:
            raise spec.error(objection)
        facts = facts_after(pass_class, facts)
        planned.append(PlannedPass(spec, pass_class, options, target, checkpoints or {}))
    return planned


def check_weights(planned: Sequence[PlannedPass], program: Program) -> None:
    """The program must hold what each pass says it needs.

    Passes behind one that brings weights are left for when it has run.

    Raises:
        BadInput: a pass needs weights that no denoiser has.
    """
    for item in with_known_weights(planned):
        missing = item.pass_class.missing_weights(item.options, program)
        if missing:
            raise item.spec.error(missing_weights_message(item, missing))


def with_known_weights(planned: Sequence[PlannedPass]) -> Sequence[PlannedPass]:
    """The passes up to and with the first that brings weights."""
    for index, item in enumerate(planned):
        if item.pass_class.brings_weights:
            return planned[: index + 1]
    return planned


def check_files(planned: Sequence[PlannedPass]) -> None:
    """The files that passes read besides the program are there.

    Raises:
        BadInput: one is not, or is damaged.
    """
    for item in planned:
        try:
            item.pass_class.files_read(item.options, item.checkpoints)
        except WeightsNotGiven as error:
            hint = item.pass_class.hint_about_weights(item.options)
            raise item.spec.error(f"{error}{': ' if hint else ''}{hint}") from None
        except BadInput as error:
            raise item.spec.error(str(error)) from None


def missing_weights_message(planned: PlannedPass, missing: Sequence[str]) -> str:
    """What a pass that lacks weights says: their names, or the first and how many more."""
    names = ", ".join(missing[:3] if len(missing) <= 3 else missing[:1])
    more = f" and {len(missing) - 1} more" if len(missing) > 3 else ""
    hint = planned.pass_class.hint_about_weights(planned.options)
    return (
        f"{planned.spec.name} needs weights named {names}{more}, which the checkpoint does not "
        f"hold{': ' if hint else ''}{hint}"
    )


def facts_after(pass_class: type[Pass], facts: frozenset[Fact]) -> frozenset[Fact]:
    """What holds after a pass."""
    return (facts - pass_class.invalidates) | pass_class.establishes


def _class_of(spec: PassSpec) -> type[Pass]:
    try:
        return get_pass(spec.name)
    except BadInput as error:
        raise spec.error(str(error)) from None


def _check_order(
    spec: PassSpec, pass_class: type[Pass], facts: frozenset[Fact], later: Sequence[PassSpec]
) -> None:
    for fact in sorted(pass_class.requires - facts):
        raise spec.error(
            f"{spec.name} requires the fact {fact.value!r}, which does not hold here; "
            f"{_remedy(fact, spec, later)}"
        )
    for fact in sorted(pass_class.conflicts & facts):
        raise spec.error(f"{spec.name} cannot run once {fact.value!r} holds; move it up")


def _remedy(fact: Fact, spec: PassSpec, later: Sequence[PassSpec]) -> str:
    makers = [name for name, item in registered_passes().items() if fact in item.establishes]
    for other in later:
        if other.name in makers:
            return f"move {other.name!r} before {spec.name!r}"
    if makers:
        return f"add {' or '.join(map(repr, makers))} before {spec.name!r}"
    return "no pass establishes it"
