"""Is a serialized graph only a graph? Asked before torch deserializes it.

torch's deserialization resolves operator names by attribute look-up from `torch`, evaluates sizes
with sympy (which is `eval`), and imports what a tree spec names. Each of these is held to what
graphs of ours contain; anything else is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from turbo_opt.artifact.expressions import parse_expression
from turbo_opt.errors import BadInput

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_INPUTS = "data/sample_inputs/model.pt"
MEMBERS = frozenset({
    MODEL, WEIGHTS, _CONSTANTS, _INPUTS,
    "archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id",
})  # fmt: skip
"""Members of a graph file, besides empty `data/weights/weight_*`."""

_OPERATOR = re.compile(
    r"torch\.ops\.(aten|turbo_opt|prims)\.(?!__)\w+\.\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|torch\.sym_(max|min|float|int|not|ite|sum)|math\.(trunc|ceil|floor)"
)
_REFUSED_OPERATORS = re.compile(r"torch\.ops\.aten\.(from_file|_print|save)\b.*")
_RANGE = re.compile(r"[\w\s+*/(),-]{1,4000}")
_TREE_TYPES = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
_META_KEYS = {"nn_module_stack", "stack_trace", "torch_fn"}


def check_members(path: Path, members: Mapping[str, bytes]) -> None:
    """The members of a graph file hold one weight-free graph and nothing that would be executed.

    Raises:
        BadInput: something else is in it; the message names what.
    """
    for name in (MODEL, WEIGHTS, _CONSTANTS):
        if name not in members:
            raise BadInput(f"{path}: damaged, {name} is missing")
    if members.get(_INPUTS):
        raise BadInput(f"{path}: holds pickled example inputs, which are never read")
    for name, content in members.items():
        if name.startswith("data/weights/weight_") and content:
            raise BadInput(f"{path}: holds weights ({name}); a graph file has none")
    if _json(path, _CONSTANTS, members) != {"config": {}}:
        raise BadInput(f"{path}: holds constants; they belong into the weights")
    _check_weights(path, _json(path, WEIGHTS, members))
    _check_model(path, _json(path, MODEL, members))


def _json(path: Path, name: str, members: Mapping[str, bytes]) -> Any:
    try:
        return json.loads(members[name])
    except (ValueError, RecursionError):
        raise BadInput(f"{path}: damaged, {name} is not JSON") from None


def _check_weights(path: Path, config: Any) -> None:
    try:
        entries = list(config["config"].items())
        for name, entry in entries:
            device = entry["tensor_meta"]["device"]["type"]
            if entry["use_pickle"] is not False or device != "meta":
                raise BadInput(f"{path}: weight {name!r} is not a placeholder on meta")
            if not re.fullmatch(r"weight_\d+", entry["path_name"]):
                raise BadInput(f"{path}: weight {name!r} names the file {entry['path_name']!r}")
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{path}: damaged, {WEIGHTS} is malformed") from None


def _check_model(path: Path, model: Any) -> None:
    if not isinstance(model, dict) or not isinstance(model.get("graph_module"), dict):
        raise BadInput(f"{path}: damaged, {MODEL} holds no graph")
    if model.get("guards_code"):
        raise BadInput(f"{path}: holds guard code, which is never run")
    for name in model.get("range_constraints") or {}:
        if not isinstance(name, str) or not _RANGE.fullmatch(name):
            raise BadInput(f"{path}: {str(name)[:80]!r} is not a size whose range could be known")
    expressions = set()
    for key, value in _entries(model):
        if key == "target" and isinstance(value, str):
            if not _OPERATOR.fullmatch(value) or _REFUSED_OPERATORS.fullmatch(value):
                raise BadInput(f"{path}: calls {value!r}, which is no operator of a graph")
        elif key == "expr_str":
            if not (isinstance(value, str) and value in expressions):
                _check_expression(path, value)
                expressions.add(value)
        elif key in ("in_spec", "out_spec"):
            _check_tree(path, value)
        elif key == "metadata" and value:
            _check_metadata(path, value)
        elif key in ("as_graph", "as_custom_obj", "as_operator", "custom_obj", "as_opaque_value"):
            raise BadInput(f"{path}: the graph holds a {key.removeprefix('as_')}, which none needs")


def _entries(root: Any) -> Iterator[tuple[str, Any]]:
    stack = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _check_expression(path: Path, text: Any) -> None:
    try:
        parse_expression(text)
    except ValueError as error:
        raise BadInput(
            f"{path}: {str(text)[:80]!r} is not an expression over sizes ({error})"
        ) from None


def _check_tree(path: Path, text: Any) -> None:
    try:
        for key, value in _entries(json.loads(text)):
            if key == "type" and value not in _TREE_TYPES:
                raise BadInput(f"{path}: arguments of the type {value!r} are refused")
            if key == "context" and value is not None:
                context = json.loads(value)
                if context is not None and not all(isinstance(item, str) for item in context):
                    raise BadInput(f"{path}: a tree spec with the context {value[:80]!r}")
                if isinstance(context, dict):
                    raise BadInput(f"{path}: a tree spec with the context {value[:80]!r}")
    except (TypeError, ValueError, RecursionError):
        raise BadInput(f"{path}: damaged, a tree spec is not JSON") from None


def _check_metadata(path: Path, value: Any) -> None:
    if not isinstance(value, dict) or not value.keys() <= _META_KEYS:
        raise BadInput(f"{path}: unknown metadata {sorted(set(value) - _META_KEYS)[:3]}")
