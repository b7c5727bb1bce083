"""Turn a pydantic error into sentences: the key's path, the nearest name, the allowed values."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from turbo_opt.errors import nearest, unknown

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One fault in a document.

    Attributes:
        path: the key's path.
        message: what is wrong and what would be right.
        at_key: the fault is in the key itself rather than in its value.
    """

    path: KeyPath
    message: str
    at_key: bool = False


def format_path(path: KeyPath) -> str:
    """`("passes", "quantize-linear", "names", 0)` → `passes.quantize-linear.names[0]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def explain(
    model: type[BaseModel], error: ValidationError, data: Any, *, kind: str = "key"
) -> list[Problem]:
    """The faults that pydantic found when `model` read `data`, in the order of the document.

    Args:
        model: the model that was to be built.
        error: what pydantic raised.
        data: the plain data it was given.
        kind: what a key is called in the message: `key` or `option`.
    """
    found: dict[tuple[KeyPath, bool], list[str]] = {}
    for detail in error.errors(include_url=False):
        problem = _problem(model, detail, data, kind)
        messages = found.setdefault((problem.path, problem.at_key), [])
        if problem.message not in messages:
            messages.append(problem.message)
    return [Problem(path, "; or ".join(lines), key) for (path, key), lines in found.items()]


def _problem(model: type[BaseModel], detail: ErrorDetails, data: Any, kind: str) -> Problem:
    location, value = detail["loc"], detail["input"]
    if detail["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        name = str(location[-1])
        return Problem(_existing(location, data), unknown(kind, name, known), at_key=True)
    if detail["type"] == "missing":
        parent = _existing(location[:-1], data)
        return Problem((*parent, location[-1]), f"required {kind} is missing")
    path = _existing(location, data)
    context = detail.get("ctx", {})
    if detail["type"] in ("literal_error", "enum"):
        return Problem(path, _not_allowed(value, str(context["expected"])))
    if detail["type"] in ("tuple_type", "list_type"):  # both are lists in YAML
        return Problem(path, f"must be a list, got {_short(value)}")
    if "error" in context:
        return Problem(path, str(context["error"]))
    message = detail["msg"].replace("Input should be", "must be")
    return Problem(path, f"{message[0].lower()}{message[1:]}, got {_short(value)}")


def _not_allowed(value: Any, expected: str) -> str:
    guess = nearest(value, re.findall(r"'([^']*)'", expected)) if isinstance(value, str) else ""
    return f"{_short(value)} is not allowed{guess or '.'} Allowed: {expected}."


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _existing(location: KeyPath, data: Any) -> KeyPath:
    """The part of `location` that is in `data`: pydantic adds names of union members to it."""
    path: list[str | int] = []
    for part in location:
        in_list = isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        if in_list or (isinstance(data, Mapping) and part in data):
            data = data[part]
            path.append(part)
    return tuple(path)


def _known_keys(model: type[BaseModel], location: KeyPath) -> list[str]:
    """The keys that the mapping at `location` may have."""
    annotations: list[Any] = [model]
    for part in location:
        inner = [a for outer in annotations for a in _children(outer, part)]
        annotations = inner or annotations
    models = [m for a in annotations for m in _members(a) if _is_model(m)]
    return [info.alias or name for m in models for name, info in m.model_fields.items()]


def _children(annotation: Any, part: str | int) -> Iterator[Any]:
    for member in _members(annotation):
        if _is_model(member):
            for name, info in member.model_fields.items():
                if part in (name, info.alias):
                    yield info.annotation
        elif get_args(member):
            yield get_args(member)[-1 if isinstance(part, str) else 0]


def _members(annotation: Any) -> Iterator[Any]:
    """The members of a union, without `Annotated`; any other type is its own only member."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
