"""What a pass is: a name, typed options, what it needs and gives, and `run`.

@register_pass
class FuseNorms(Pass):
    name = "fuse-norms"
    requires = frozenset({Fact.CANONICAL})
    numerics = Numerics.REORDERS

    def run(self, program, options, context): ...
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatch
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from turbo_opt.errors import BadInput, unknown
from turbo_opt.ir.facts import Fact

if TYPE_CHECKING:
    from turbo_opt.compiler.context import PassContext
    from turbo_opt.ir.program import Program
    from turbo_opt.targets import Target


class Numerics(StrEnum):
    """How far a pass may move the result; each tier has a default verification budget."""

    EXACT = "exact"
    """Bit for bit."""
    REORDERS = "reorders"
    """Float rounding only: the same formula in another order or a wider intermediate."""
    QUANTIZES = "quantizes"
    """Operands of lower precision."""
    RETRAINED = "retrained"
    """Other weights or another schedule: the function itself differs."""


class PassOptions(BaseModel):
    """Options of a pass. Unknown keys are errors; every field has a description."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Match:
    """One place where a pass fired."""

    denoiser: str
    node: str
    """The anchor's name in the graph before the pass."""
    module: str
    """The module path it came from, such as `blocks.3.attn1.to_q`."""


@dataclass(frozen=True)
class NearMiss:
    """One place where a pass nearly fired, and why it did not."""

    denoiser: str
    node: str
    module: str
    reason: str


@dataclass(frozen=True)
class LayerChoice:
    """What a pass chose for one layer where it treats layers differently, and why."""

    denoiser: str
    module: str
    choice: str
    """In a word or two, such as `fp8-block` or `topk 0.2`."""
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What `Pass.run` gives back."""

    program: Program
    matches: tuple[Match, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    stats: Mapping[str, float | int | str] = field(default_factory=dict)
    choices: tuple[LayerChoice, ...] = ()


class Pass(abc.ABC):
    """One transformation of a Program, in one file. See DESIGN in docs/architecture.md."""

    name: ClassVar[str]
    """Registered kebab-case name."""
    Options: ClassVar[type[PassOptions]] = PassOptions
    requires: ClassVar[frozenset[Fact]] = frozenset()
    """Facts that must hold before."""
    establishes: ClassVar[frozenset[Fact]] = frozenset()
    invalidates: ClassVar[frozenset[Fact]] = frozenset()
    conflicts: ClassVar[frozenset[Fact]] = frozenset()
    """Facts that must not hold before."""
    numerics: ClassVar[Numerics]
    needs_weights: ClassVar[tuple[str, ...]] = ()
    """Globs over parameter names that the checkpoint must hold for this pass to make sense."""
    missing_weights_hint: ClassVar[str] = ""
    """What it means that weights are missing, and what to do, in one clause."""
    brings_weights: ClassVar[bool] = False
    """Whether it may give the program weights that later passes need: those are asked for once it
    has run."""
    may_match_nothing: ClassVar[bool] = False
    """True only where doing nothing is a normal outcome (a graph already in canonical form)."""

    @abc.abstractmethod
    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        """Rewrite `program` (the pass owns this copy) and say what matched and what nearly did.

        Raises:
            BadInput: an option does not fit the model (a selector without a match, a dimension
                that the scheme cannot take).
        """

    @classmethod
    def objection_to(cls, options: PassOptions, target: Target) -> str | None:
        """Why the pass with these options cannot serve `target`, in one clause; None if it can."""
        return None

    @classmethod
    def files_read(cls, options: PassOptions, checkpoints: Mapping[str, str]) -> Sequence[str]:
        """Digests of the files besides the program that the result depends on.

        Args:
            checkpoints: the recipe's `weights`: name → path or hub id.

        Raises:
            BadInput: one of them is not there or cannot be read.
        """
        return ()

    @classmethod
    def missing_weights(cls, options: PassOptions, program: Program) -> list[str]:
        """Names or globs of weights that the pass needs and the captured `program` lacks."""
        names = [name for denoiser in program for name in (*denoiser.weights, *denoiser.unread)]
        return [glob for glob in cls.needs_weights if not any(fnmatch(n, glob) for n in names)]

    @classmethod
    def hint_about_weights(cls, options: PassOptions) -> str:
        """What it means that weights are missing with these options, and what to do."""
        return cls.missing_weights_hint

    @classmethod
    def summary(cls) -> str:
        """The first line of the module's docstring: what `turbo-opt passes list` prints."""
        import sys

        doc = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
        return doc.strip().splitlines()[0]


_PASSES: dict[str, type[Pass]] = {}


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass known by its `name`.

    Raises:
        ValueError: the name is taken by another class.
    """
    taken = _PASSES.get(cls.name)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
        raise ValueError(f"pass name {cls.name!r} is taken by {taken.__module__}.{taken.__name__}")
    _PASSES[cls.name] = cls
    return cls


def registered_passes() -> dict[str, type[Pass]]:
    """All known passes by name; imports `turbo_opt.passes` and installed plug-ins once.

    Third-party passes are found through the entry-point group `turbo_opt.passes`.
    """
    _load_builtin_and_plugins()
    return dict(sorted(_PASSES.items()))


def get_pass(name: str) -> type[Pass]:
    """The pass class registered as `name`.

    Raises:
        BadInput: no such pass; the message names the nearest one.
    """
    passes = registered_passes()
    if name not in passes:
        raise BadInput(unknown("pass", name, passes))
    return passes[name]


_loaded = False


def _load_builtin_and_plugins() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    import importlib
    import pkgutil
    from importlib.metadata import entry_points

    import turbo_opt.passes as builtin

    for module in pkgutil.iter_modules(builtin.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{builtin.__name__}.{module.name}")
    for entry in entry_points(group="turbo_opt.passes"):
        entry.load()
