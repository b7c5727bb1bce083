"""Operators and their providers.

An operator is defined once: a schema in torch's `turbo_opt::` namespace, a fake implementation, a
float32 `reference` (its meaning), and faster providers of the same signature. Which provider runs
is decided from the device's capability and a small description of the arguments, before anything
is launched, and remembered: the one that is forced, else the one that was measured to be fastest
(see `provider_table`), else the first in declared order that serves. Deciding never touches a
device, so it also answers for a GPU that is only described:

    choose("block_linear", "sm90", q, q_scale, weight, weight_scale, None, "fp8-block", bfloat16)
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .capability import Capability, capability_of, parse_capability
from .errors import ProviderError, name_the_nearest
from .provider_table import MeasuredChoice, any_measured, call_key, forget_tables, measured_choice

REFERENCE = "reference"
PROVIDERS_VARIABLE = "TURBO_OPT_PROVIDERS"
MOST_DECISIONS = 4096  # remembered per operator, one for each combination of shapes and dtypes

_library = torch.library.Library("turbo_opt", "FRAGMENT")
_operators: dict[str, Operator] = {}


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator.

    `supports(capability, description)` returns None, or why not, in a sentence fragment.
    `module` holds a function named as the operator is; it is imported when first chosen.
    `requires` names the package that this machine must have for it, if any; `unavailable` says
    what else this machine lacks, or None.
    """

    name: str
    module: str
    supports: Callable[[Capability, Any], str | None]
    requires: str | None = None
    unavailable: Callable[[], str | None] = lambda: None

    def missing(self) -> str | None:
        """Why it cannot run in this environment, or None."""
        if self.requires and importlib.util.find_spec(self.requires) is None:
            return f"the package {self.requires!r} is not installed"
        return self.unavailable()


def _anything(capability: Capability, description: Any) -> str | None:
    return None


def fastest_first(capability: Capability, description: Any, names: Sequence[str]) -> Sequence[str]:
    """Providers in declared order on a GPU; the reference before everything on a CPU."""
    others = [name for name in names if name != REFERENCE]
    return [REFERENCE, *others] if capability.is_cpu else [*others, REFERENCE]


@dataclass(frozen=True)
class Choice:
    """The provider chosen for a call, and why each other provider was passed over.

    Attributes:
        serving: every provider that could serve it, in declared order.
        measured: the record that decided, None where none did.
    """

    operator: str
    capability: Capability
    provider: str
    passed_over: Mapping[str, str]
    serving: tuple[str, ...]
    measured: MeasuredChoice | None = None

    def __str__(self) -> str:
        lines = [f"{self.operator} on {self.capability}: {self.provider}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.passed_over.items()]
        return "\n".join(lines)


@dataclass
class _Decision:
    """A choice bound to its implementation, and how often it has run."""

    provider: str
    implementation: Callable[..., Any]
    calls: int = 0


@dataclass
class Operator:
    """A `turbo_opt::` operator: its schema, its meaning, and who can compute it.

    `check(*args)` raises OperatorInputError for arguments that the operator does not define; it
    serves real and fake tensors. `describe(*args)` returns the hashable facts on which the choice
    depends. `prefer(capability, description, names)` puts provider names in order.
    `typical_inputs(*args)`, if there, returns random arguments with typical values in place of
    those that decide how long a call takes: what is timed.
    """

    name: str
    schema: str
    package: str
    fake: Callable[..., Any]
    check: Callable[..., None]
    describe: Callable[..., Hashable]
    providers: Sequence[Provider] = ()
    prefer: Callable[[Capability, Any, Sequence[str]], Sequence[str]] = fastest_first
    typical_inputs: Callable[..., tuple[Any, ...]] | None = None
    _decisions: dict[Hashable, _Decision] = field(default_factory=dict, repr=False)
    _retired_calls: dict[str, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        reference = Provider(REFERENCE, f"{self.package}.reference", _anything)
        self._providers = {p.name: p for p in (*self.providers, reference)}
        _library.define(f"{self.name}{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"turbo_opt::{self.name}", self._run_fake, lib=_library)
        _operators[self.name] = self

    def provider_names(self) -> list[str]:
        return list(self._providers)

    def choose(self, device: Capability | str | torch.device, *args: Any) -> Choice:
        """Which provider serves these arguments on a described or a present device.

        A described device (`Capability` or `"sm90"`) is taken to have every package; a
        `torch.device` is one of this machine, with the packages that are installed here.
        The arguments are those of the operator; their tensors may be fake or meta.
        """
        self.check(*args)
        present = device if isinstance(device, torch.device) else None
        if isinstance(device, torch.device):
            capability = capability_of(device)
        else:
            capability = parse_capability(device) if isinstance(device, str) else device
        description = self.describe(*args)
        reasons = {
            name: (provider.missing() if present else None)
            or provider.supports(capability, description)
            for name, provider in self._providers.items()
        }
        order = self.prefer(capability, description, list(self._providers))
        serving = tuple(name for name in order if reasons[name] is None)
        measured, chosen = None, self._forced(capability, reasons)
        if chosen is None and any_measured(capability):
            key = call_key(description, args)
            measured = measured_choice(self.name, capability, present, key, serving)
        if chosen is not None:
            why = f"{chosen!r} is forced"
        elif measured is not None:
            chosen = measured.entry.provider
            why = f"works, but {chosen!r} was measured to be faster on {measured.device}"
        else:
            chosen = serving[0]
            why = f"works, but {chosen!r} is preferred on {capability}"
        passed_over = {name: reasons[name] or why for name in self._providers if name != chosen}
        return Choice(self.name, capability, chosen, passed_over, serving, measured)

    def _forced(self, capability: Capability, reasons: Mapping[str, str | None]) -> str | None:
        forced = forced_providers().get(self.name)
        if forced is not None and reasons[forced] is not None:
            raise ProviderError(
                f"{self.name}: provider {forced!r} was forced, but cannot serve this call on "
                f"{capability}: {reasons[forced]}"
            )
        return forced

    def _decide(self, signature: Hashable, args: Sequence[Any]) -> _Decision:
        choice = self.choose(args[0].device, *args)
        module = importlib.import_module(self._providers[choice.provider].module)
        if len(self._decisions) >= MOST_DECISIONS:
            self.forget_decisions()
        decision = _Decision(choice.provider, getattr(module, self.name))
        self._decisions[signature] = decision
        return decision

    def _run(self, *args: Any) -> Any:
        device = args[0].device
        # What was checked and decided once for these shapes and dtypes holds for the next call.
        signature = (
            device,
            *[(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in args],
        )
        decision = self._decisions.get(signature)
        if decision is None:
            decision = self._decide(signature, args)
        decision.calls += 1
        with contextlib.ExitStack() as surroundings:
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                surroundings.enter_context(torch.cuda.device(device))
            if torch.is_autocast_enabled(device.type):
                # Providers say themselves in which dtypes they compute.
                surroundings.enter_context(torch.autocast(device.type, enabled=False))
            return decision.implementation(*args)

    def _run_fake(self, *args: Any) -> Any:
        self.check(*args)
        return self.fake(*args)

    def calls(self) -> dict[str, int]:
        """How many calls each provider has served."""
        totals = dict(self._retired_calls)
        for decision in self._decisions.values():
            totals[decision.provider] = totals.get(decision.provider, 0) + decision.calls
        return {name: count for name, count in totals.items() if count}

    def forget_decisions(self, keep_calls: bool = True) -> None:
        self._retired_calls = self.calls() if keep_calls else {}
        self._decisions.clear()


_forced_by_context: dict[str, str] = {}
_forced_by_environment: dict[str, str] | None = None


def operators() -> dict[str, Operator]:
    """Every registered operator, by name."""
    return dict(_operators)


def operator(name: str) -> Operator:
    """The operator of that name; the error for an unknown one names the nearest."""
    if name not in _operators:
        raise ProviderError(f"unknown operator {name!r}: {name_the_nearest(name, _operators)}")
    return _operators[name]


def choose(name: str, device: Capability | str | torch.device, *args: Any) -> str:
    """The name of the provider that would serve `turbo_opt::name(*args)`; see Operator.choose."""
    return operator(name).choose(device, *args).provider


def explain(name: str, device: Capability | str | torch.device, *args: Any) -> Choice:
    """The choice with the reason why each other provider was passed over; `str()` it to read."""
    return operator(name).choose(device, *args)


def _checked(forced: Mapping[str, str], source: str) -> dict[str, str]:
    for name, provider in forced.items():
        allowed = operator(name).provider_names()
        if provider not in allowed:
            raise ProviderError(
                f"{source}: {name} has no provider {provider!r}: "
                f"{name_the_nearest(provider, allowed)}"
            )
    return dict(forced)


def _parse_environment(text: str) -> dict[str, str]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    for entry in entries:
        if entry.count("=") != 1:
            raise ProviderError(
                f"{PROVIDERS_VARIABLE}: {entry!r} is not of the form operator=provider"
            )
    pairs = (entry.split("=") for entry in entries)
    return _checked(
        {name.strip(): provider.strip() for name, provider in pairs}, PROVIDERS_VARIABLE
    )


def forced_providers() -> dict[str, str]:
    """The providers now forced: by `force_provider`, else by the environment variable."""
    global _forced_by_environment
    if _forced_by_environment is None:
        _forced_by_environment = _parse_environment(os.environ.get(PROVIDERS_VARIABLE, ""))
    return {**_forced_by_environment, **_forced_by_context}


@contextlib.contextmanager
def force_provider(forced: Mapping[str, str]) -> Iterator[None]:
    """Within the context, run these operators by these providers, in every thread.

    A provider that cannot serve a call raises ProviderError there, with the reason. What
    TURBO_OPT_PROVIDERS (`block_linear=triton,adaln=reference`, read once) forces comes second.
    """
    global _forced_by_context
    before = _forced_by_context
    _set_forced({**before, **_checked(forced, "force_provider")})
    try:
        yield
    finally:
        _set_forced(before)


def _set_forced(forced: dict[str, str]) -> None:
    global _forced_by_context
    _forced_by_context = forced
    for each in _operators.values():
        each.forget_decisions()


def read_provider_tables() -> None:
    """Decide anew, by what the provider tables hold now."""
    forget_tables()
    for each in _operators.values():
        each.forget_decisions()


def recorded_choices() -> dict[str, dict[str, int]]:
    """What has run so far: operator → provider → number of calls."""
    calls = {name: each.calls() for name, each in _operators.items()}
    return {name: counts for name, counts in calls.items() if counts}


def clear_recorded_choices() -> None:
    """Start counting anew."""
    for each in _operators.values():
        each.forget_decisions(keep_calls=False)
