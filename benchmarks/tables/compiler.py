"""What the passes are, and what compiling costs."""

from __future__ import annotations

from benchmarks.tables.cells import by_name
from turbo_opt.compiler.base import registered_passes


def passes() -> str:
    """Name, tier, what it does."""
    lines = ["| pass | tier | what it does |", "| --- | --- | --- |"]
    for name, item in registered_passes().items():
        lines.append(f"| `{name}` | {item.numerics.value} | {item.summary().rstrip('.')} |")
    return "\n".join(lines)


def compilation() -> str:
    """What compiling costs on a small machine."""
    lines = ["| | | |", "| --- | ---: | --- |"]
    for record in by_name("compile_large.json").values():
        model, what = record.name.removeprefix("cpu/").split("/")
        name = f"{model}, {_measure(what)}"
        ceiling = record.ceiling
        digits = 0 if record.unit == "s" else 1
        against = f"{ceiling.value:.{digits}f} {ceiling.unit}: {ceiling.what}" if ceiling else ""
        lines.append(f"| {name} | {record.value:.1f} {record.unit} | {against} |")
    return "\n".join(lines)


def _measure(name: str) -> str:
    """A record's last part in words, without its unit."""
    for unit in ("_gb_per_s", "_gib", "_s"):
        name = name.removesuffix(unit)
    return name.replace("_", " ")
