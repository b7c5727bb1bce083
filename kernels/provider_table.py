"""Which provider was measured to be the fastest, by device, operator and call.

A table is a JSON file that `turbo-opt bench kernels` writes:

    {"format": 1,
     "devices": {"NVIDIA H200": {
       "capability": "sm90", "versions": {"kernels": "…", "torch": "…", "triton": "…"},
       "operators": {"block_linear": {"1x32768x1536 scheme=fp8-block dtype=bfloat16 …": {
         "provider": "torch", "ms": {"torch": 0.21, "triton": 0.3},
         "skipped": {"reference": "out of memory"}}}}}}}

The user's own table comes first (`$TURBO_OPT_PROVIDER_TABLE`, by default `providers.json` in the
folder of compiled kernels), then those in `measured/` beside this file. A record of the device's
own name comes before one of another device of the same capability. What cannot be used is left out:
a file that is damaged or of another format, the user's measurements of other kernels or versions of
torch and Triton, and an entry whose provider does not serve the call or that knows nothing of one
that does. Then the order that the operator declares holds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ._cuda.compiler import cache_folder
from .capability import Capability
from .errors import KernelError
from .whole_file import write_whole

FORMAT = 1
TABLE_VARIABLE = "TURBO_OPT_PROVIDER_TABLE"  # a file; "0": no table at all
_HERE = Path(__file__).parent
SHIPPED = _HERE / "measured"
_SOURCES = ("*.py", "*.cu", "*.cuh")


class ProviderTableError(KernelError):
    """A file is no table that can be used."""


@dataclass(frozen=True)
class Entry:
    """The measured choice for one kind of call.

    Attributes:
        ms: provider → median milliseconds.
        skipped: provider → why it was not timed.
    """

    provider: str
    ms: Mapping[str, float]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def judges(self, serving: Collection[str]) -> bool:
        """Whether its provider serves, and every other one that does was looked at."""
        return self.provider in serving and set(serving) <= {*self.ms, *self.skipped}


@dataclass
class DeviceRecord:
    """Everything measured on one kind of device; `operators`: operator → key of a call → entry."""

    capability: str
    versions: Mapping[str, str]
    operators: dict[str, dict[str, Entry]] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasuredChoice:
    """An entry that was found, and the device that it was measured on."""

    device: str
    entry: Entry


Table = dict[str, DeviceRecord]
"""Name of a device → what was measured on it."""


def call_key(description: Any, args: Sequence[Any]) -> str:
    """What a call is known by in a table.

    The shape of the first argument, all sides but the last rounded to a power of two, and the facts
    on which the operator's choice depends: calls of almost one size share an entry.
    """
    *outer, inner = args[0].shape or (1,)
    shape = "x".join(str(side) for side in (*map(_rounded, outer), inner))
    return " ".join([shape, *_facts(description)])


def device_name(device: torch.device) -> str:
    """What a device of this machine is called in a table."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def measured_choice(
    operator: str,
    capability: Capability,
    device: torch.device | None,
    key: str,
    serving: Collection[str],
) -> MeasuredChoice | None:
    """The measured choice for a call, None if there is none that can be used.

    Args:
        device: of this machine; None for one that is only described.
        serving: the providers that could serve the call.
    """
    for name, record in _candidates(capability, device):
        entry = record.operators.get(operator, {}).get(key)
        if entry is not None and entry.judges(serving):
            return MeasuredChoice(name, entry)
    return None


def any_measured(capability: Capability) -> bool:
    """Whether a table holds anything for that kind of device."""
    return any(
        record.capability == str(capability) for table in _tables() for record in table.values()
    )


def choices_digest(capability: Capability) -> str | None:
    """SHA-256 over all choices recorded for a kind of device; None if there are none."""
    found = [
        (name, operator, key, entry.provider)
        for name, record in _candidates(capability, None)
        for operator, entries in record.operators.items()
        for key, entry in entries.items()
    ]
    if not found:
        return None
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()


def user_table() -> Path | None:
    """The file of the user's own measurements; None if tables are turned off."""
    chosen = os.environ.get(TABLE_VARIABLE)
    if chosen == "0":
        return None
    return Path(chosen) if chosen else cache_folder() / "providers.json"


def current_versions() -> dict[str, str]:
    """What a measurement holds for: our kernels' source, torch and Triton."""
    versions = {"kernels": _source_digest(), "torch": str(torch.__version__)}
    try:
        versions["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        versions["triton"] = "none"
    return versions


def read_table(path: Path) -> Table:
    """The table in a file.

    Raises:
        ProviderTableError: it is damaged or of another format.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ProviderTableError(f"{path}: its format is {content['format']!r}, not {FORMAT}")
        return {name: _device(record) for name, record in content["devices"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ProviderTableError(f"{path}: not a table of measured providers") from None


def merged(old: Table, new: Table) -> Table:
    """`old` with the entries of `new`; a device measured with other versions starts afresh."""
    table = dict(old)
    for name, record in new.items():
        before = table.get(name)
        operators: dict[str, dict[str, Entry]] = {}
        if before is not None and dict(before.versions) == dict(record.versions):
            operators = {operator: dict(found) for operator, found in before.operators.items()}
        for operator, entries in record.operators.items():
            operators.setdefault(operator, {}).update(entries)
        table[name] = DeviceRecord(record.capability, record.versions, operators)
    return table


def write_table(path: Path, table: Table) -> None:
    """Write a table in one step.

    Raises:
        OSError: it cannot be written.
    """
    devices = {
        name: {
            "capability": record.capability,
            "versions": dict(record.versions),
            "operators": {
                operator: _entries_json(entries) for operator, entries in record.operators.items()
            },
        }
        for name, record in table.items()
    }
    text = json.dumps({"format": FORMAT, "devices": devices}, indent=1, sort_keys=True) + "\n"
    write_whole(path, text)


def forget_tables() -> None:
    """Read the tables again when they are next needed."""
    _tables.cache_clear()


def _candidates(
    capability: Capability, device: torch.device | None
) -> Iterator[tuple[str, DeviceRecord]]:
    """Records of that kind of device, the device's own first."""
    alike = [
        (name, record)
        for table in _tables()
        for name, record in sorted(table.items())
        if record.capability == str(capability)
    ]
    own = device_name(device) if device is not None and alike else None
    yield from sorted(alike, key=lambda item: item[0] != own)


@functools.cache
def _tables() -> tuple[Table, ...]:
    """All tables that can be used, the user's first; what is wrong with one is said once."""
    own = user_table()
    if own is None:
        return ()
    tables = []
    for path in (own, *sorted(SHIPPED.glob("*.json"))):
        try:
            table = read_table(path)
        except FileNotFoundError:
            continue
        except (ProviderTableError, OSError) as error:
            warnings.warn(f"ignored: {error}", stacklevel=2)
            continue
        tables.append(_of_these_versions(table, path) if path == own else table)
    return tuple(tables)


def _of_these_versions(table: Table, path: Path) -> Table:
    """What was measured with the kernels, torch and Triton that run now."""
    versions = current_versions()
    outdated = [name for name, record in table.items() if dict(record.versions) != versions]
    if outdated:
        warnings.warn(
            f"ignored: {path}: measured on {', '.join(sorted(outdated))} with other kernels, torch "
            "or Triton; `turbo-opt bench kernels` measures again",
            stacklevel=2,
        )
    return {name: record for name, record in table.items() if name not in outdated}


def _device(content: Any) -> DeviceRecord:
    operators = {
        operator: {key: _entry(entry) for key, entry in entries.items()}
        for operator, entries in content["operators"].items()
    }
    versions = {str(name): str(version) for name, version in content["versions"].items()}
    return DeviceRecord(str(content["capability"]), versions, operators)


def _entry(content: Any) -> Entry:
    ms = {str(name): float(value) for name, value in content["ms"].items()}
    skipped = {str(name): str(reason) for name, reason in content.get("skipped", {}).items()}
    return Entry(str(content["provider"]), ms, skipped)


def _entries_json(entries: Mapping[str, Entry]) -> dict[str, Any]:
    return {
        key: {"provider": each.provider, "ms": dict(each.ms), "skipped": dict(each.skipped)}
        for key, each in entries.items()
    }


def _rounded(side: int) -> int:
    return 2 ** round(math.log2(side)) if side else 0


def _facts(description: Any) -> list[str]:
    """A description's fields as `name=value`, those of a nested tuple in place."""
    if not isinstance(description, tuple):
        return [_text(description)]
    names = getattr(description, "_fields", None)
    if names is None:
        return [fact for item in description for fact in _facts(item)]
    return [f"{name}={_text(item)}" for name, item in zip(names, description, strict=True)]


def _text(value: Any) -> str:
    return str(value).removeprefix("torch.")


@functools.cache
def _source_digest() -> str:
    """Of all source of the kernels package."""
    hasher = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in _HERE.rglob(pattern)):
        hasher.update(str(path.relative_to(_HERE)).encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]
