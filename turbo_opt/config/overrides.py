"""Change a recipe from the command line: `--set`, `--disable` and `--until`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from turbo_opt.compiler.pipeline import PassSpec
from turbo_opt.config.document import Document, Location, Mark
from turbo_opt.config.explain import KeyPath, format_path
from turbo_opt.config.yaml_reader import read_yaml
from turbo_opt.errors import BadInput, nearest

_PART = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)((?:\[[0-9]{1,6}\])*)")


def apply_override(document: Document, text: str) -> None:
    """Apply one `--set KEY=VALUE` to a recipe that is not validated yet.

    A KEY is a path such as `generate.height`, `passes.quantize-linear.scheme`, or
    `passes.quantize-linear[1].scheme` for the second pass of that name. A VALUE is YAML.

    Raises:
        BadInput: not of that form, no such pass, or a path through something that has no keys.
    """
    flag = f"--set {text}"
    key, equals, value = text.partition("=")
    path = _parse_path(key.strip())
    if not equals or path is None:
        raise BadInput(f"{flag}: must be KEY=VALUE, like generate.height=480")
    new = read_yaml(value, lambda line, column: Location(flag))
    if path[0] == "passes" and len(path) > 1:
        path = _into_pass(document, path, flag)
    for depth in range(1, len(path)):
        _make_mapping(document, path[:depth], path[depth], flag)
    document.replace(path, new)


def _parse_path(text: str) -> KeyPath | None:
    parts: list[str | int] = []
    for piece in text.split("."):
        match = _PART.fullmatch(piece)
        if match is None:
            return None
        parts.append(match[1])
        parts.extend(int(index) for index in re.findall(r"[0-9]+", match[2]))
    return tuple(parts)


def _into_pass(document: Document, path: KeyPath, flag: str) -> KeyPath:
    """`passes.NAME[i].option` → `passes[k].NAME.option`, with a bare name made a mapping."""
    items = document.data.get("passes")
    items = items if isinstance(items, list) else []
    names = [_name_of(item) for item in items]
    if isinstance(path[1], int):
        raise BadInput(f"{flag}: name the pass, like passes.{names[0] if names else 'NAME'}")
    index = path[2] if len(path) > 2 and isinstance(path[2], int) else None
    position = select(names, path[1], index, flag)
    name, rest = path[1], path[2 if index is None else 3 :]
    if isinstance(items[position], str):
        mark = document.marks[("passes", position)]
        items[position] = {name: None}
        document.marks[("passes", position, name)] = mark
    if rest == ("optional",):
        return ("passes", position, "optional")
    return ("passes", position, name, *rest)


def _name_of(item: Any) -> str:
    if isinstance(item, dict):
        item = next((name for name in item if name != "optional"), "")
    return str(item)


def select(names: list[str], name: str, index: int | None, flag: str) -> int:
    """The position of a pass by its name and, if it is there more than once, by its index.

    Raises:
        BadInput: no such pass or index, or more than one pass of that name and no index.
    """
    positions = [position for position, other in enumerate(names) if other == name]
    if not positions:
        has = ", ".join(dict.fromkeys(names)) or "no passes"
        guess = nearest(name, names) or "."
        raise BadInput(f"{flag}: the recipe has no pass {name!r}{guess} It has: {has}.")
    if index is None and len(positions) > 1:
        listed = ", ".join(f"{name}[{i}]" for i in range(len(positions)))
        raise BadInput(f"{flag}: {name!r} runs more than once; say which: {listed}")
    if index is not None and index >= len(positions):
        raise BadInput(f"{flag}: {name!r} runs {len(positions)} times; there is no {name}[{index}]")
    return positions[index or 0]


def _make_mapping(document: Document, path: KeyPath, key: str | int, flag: str) -> None:
    """See that `path` holds a mapping that can take `key`, or a list that has it."""
    parent, last = document.at(path[:-1]), path[-1]
    if isinstance(parent, dict) and parent.get(last) is None:
        here = Location(flag)
        document.replace(path, Document({}, {(): Mark(here, here)}))
    value = document.at(path)
    if isinstance(key, str) and not isinstance(value, dict):
        raise BadInput(f"{flag}: {format_path(path)} has no keys, it is {value!r}")
    if isinstance(key, int) and not (isinstance(value, list) and key < len(value)):
        raise BadInput(f"{flag}: {format_path(path)} has no item {key}")


def without(specs: Iterable[PassSpec], name: str) -> tuple[PassSpec, ...]:
    """The passes without those called `name`.

    Raises:
        BadInput: there are none.
    """
    specs = tuple(specs)
    kept = tuple(spec for spec in specs if spec.name != name)
    if len(kept) == len(specs):
        select([spec.name for spec in specs], name, None, f"--disable {name}")
    return kept


def cut_after(specs: Iterable[PassSpec], last: str) -> tuple[PassSpec, ...]:
    """The passes up to and with `last`, a name, or `name[1]` where it runs more than once.

    Raises:
        BadInput: there is no such pass, or it is not clear which.
    """
    specs = tuple(specs)
    match = re.fullmatch(r"(.*?)(?:\[([0-9]{1,6})\])?", last, re.DOTALL)
    name, index = (match[1], match[2]) if match else (last, None)
    names = [spec.name for spec in specs]
    position = select(names, name, None if index is None else int(index), f"--until {last}")
    return specs[: position + 1]
