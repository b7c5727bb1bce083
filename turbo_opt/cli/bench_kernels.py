"""What `turbo-opt bench kernels` measures: the distinct operator calls of optimized recipes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from turbo_opt.cli.clip_size import check_clip_size, granularity, latent_shape
from turbo_opt.cli.places import check_writable
from turbo_opt.cli.session import Session
from turbo_opt.compiler.build import capture_recipe
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.providers import described, operator_calls
from turbo_opt.compiler.validation import PlannedPass, check_files
from turbo_opt.config.schema import Recipe
from turbo_opt.errors import BadInput
from turbo_opt.kernels import capability_of, operator
from turbo_opt.kernels.measure import Measurement, measure
from turbo_opt.kernels.provider_table import (
    TABLE_VARIABLE,
    DeviceRecord,
    ProviderTableError,
    Table,
    call_key,
    current_versions,
    device_name,
    merged,
    read_table,
    user_table,
    write_table,
)
from turbo_opt.targets import get_target


@dataclass
class Call:
    """Calls of one operator that share an entry of a provider table.

    Attributes:
        args: of one of them, tensors on meta.
        counts: recipe → calls in one evaluation of all its networks.
    """

    operator: str
    key: str
    args: Sequence[Any]
    counts: dict[str, int] = field(default_factory=dict)
    found: Measurement | None = None

    def measure(self, device: torch.device) -> None:
        """Time every provider."""
        self.found = measure(operator(self.operator), self.args, device)

    def to_json(self) -> dict[str, Any]:
        """What was found, as JSON values."""
        assert self.found is not None
        entry = self.found.entry()
        return {
            "operator": self.operator,
            "call": self.key,
            "counts": self.counts,
            "declared": self.found.declared,
            "choice": entry.provider if entry is not None else self.found.declared,
            "recorded": entry is not None,
            "times": {name: vars(timing) for name, timing in self.found.times.items()},
            "skipped": dict(self.found.skipped),
        }


class Destinations:
    """The tables to write: the user's own, and the one that was asked for.

    Raises:
        BadInput: one cannot be written, or `out` holds anything but a table; before any work.
    """

    def __init__(self, session: Session, out: Path | None) -> None:
        self._before: dict[Path, Table] = {}
        own = user_table()
        if own is None:
            session.note(f"note: {TABLE_VARIABLE}=0: the user's table is left as it is")
        else:
            check_writable(own)
            try:
                self._before[own] = _there(own)
            except (ProviderTableError, OSError) as error:
                session.note(f"note: replaced by a new one: {error}")
                self._before[own] = {}
        if out is not None:
            out = out.expanduser()
            if out.is_dir():
                raise BadInput(f"{out}: a folder; --out names a file")
            check_writable(out)
            try:
                self._before[out] = _there(out)
            except ProviderTableError as error:
                raise BadInput(f"{error}; it is not overwritten") from None

    def write(self, table: Table) -> list[Path]:
        """Add `table` to each; the files."""
        for path, before in self._before.items():
            write_table(path, merged(before, table))
        return list(self._before)


def collect(name: str, recipe: Recipe, pipeline: list[PlannedPass], into: list[Call]) -> None:
    """Add the operator calls of a recipe's optimized graphs at its clip size.

    Raises:
        BadInput: the recipe does not fit its model, or the latent size of its clips is unknown.
    """
    check_files(pipeline)
    captured = capture_recipe(recipe)
    check_clip_size(recipe, captured)
    grain = granularity(captured)
    if grain is None:
        raise BadInput(
            f"{name}: {recipe.model.source} has no vae/config.json, so the latent size of a clip "
            "is unknown"
        )
    optimized = PassManager(pipeline, verification=Verification("off")).run(captured)
    known = {(call.operator, call.key): call for call in into}
    latent, text_tokens = latent_shape(recipe, grain), recipe.generate.max_sequence_length
    for denoiser in optimized:
        for operator_name, args in operator_calls(denoiser, latent, text_tokens):
            key = call_key(operator(operator_name).describe(*args), args)
            call = known.get((operator_name, key))
            if call is None:
                call = known[operator_name, key] = Call(operator_name, key, args)
                into.append(call)
            call.counts[name] = call.counts.get(name, 0) + 1


def table_of(calls: Iterable[Call], device: torch.device) -> Table:
    """The choices as a table; calls that only one provider was timed on are not in it."""
    record = DeviceRecord(str(capability_of(device)), current_versions())
    for call in calls:
        entry = call.found.entry() if call.found is not None else None
        if entry is not None:
            record.operators.setdefault(call.operator, {})[call.key] = entry
    return {device_name(device): record}


def meant_for_another(recipe: Recipe, device: torch.device) -> str | None:
    """The recipe's target, where `device` is another kind of machine."""
    target = get_target(recipe.target)
    return target.name if described(target) != str(capability_of(device)) else None


def _there(path: Path) -> Table:
    try:
        return read_table(path)
    except FileNotFoundError:
        return {}
