"""The members of a checked graph file as an exported program, several times as fast as by torch.

`torch.export.load` looks up the type hints of a class for every record of that class, and parses
the expression of every side of every value. The graph of a network repeats both thousands of times:
here each class, each expression and each description of a value is worked out once. Nodes are made
by torch's own deserializer, which asks this module for values and expressions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from turbo_opt.artifact.expressions import build_expression, constructors, parse_expression
from turbo_opt.artifact.graph_safety import MODEL, WEIGHTS

Make = Callable[[Any], Any]
"""JSON → the record that it describes."""


def rebuild(members: Mapping[str, bytes]) -> ExportedProgram:
    """The program in the members of a graph file, which `check_members` has passed.

    Values alike are one object, as in programs that passes made: they never change.

    Raises:
        Exception: of any kind, for a graph that torch would not read either, or if torch's
            internals are not those that this relies on; `torch.export.load` is to judge.
    """
    from torch._export.serde import schema, serialize
    from torch._export.verifier import load_verifier
    from torch.fx.experimental.symbolic_shapes import ValueRanges
    from torch.utils._sympy.numbers import int_oo

    model = json.loads(members[MODEL])
    if model["schema_version"]["major"] != schema.SCHEMA_VERSION[0]:
        raise ValueError(f"schema {model['schema_version']}, not {schema.SCHEMA_VERSION}")
    values = model["graph_module"]["graph"]["tensor_values"]
    model["graph_module"]["graph"]["tensor_values"] = {}
    program = _maker(schema.ExportedProgram)(model)
    program.graph_module.graph.tensor_values = _tensor_values(values)
    ranges = {
        name: ValueRanges(
            serialize._int_to_sympy_int(bounds.min_val, -int_oo),
            serialize._int_to_sympy_int(bounds.max_val, int_oo),
        )
        for name, bounds in program.range_constraints.items()
    }
    deserializer = serialize.GraphModuleDeserializer()
    _work_once(deserializer)
    found = deserializer.deserialize(program.graph_module, _weights(members), {}, None, ranges)
    constraints = serialize.ExportedProgramDeserializer().deserialize_range_constraints(
        ranges, found.names_to_symbols
    )
    return ExportedProgram(
        root=found.graph_module,
        graph=found.graph_module.graph,
        graph_signature=found.signature,
        state_dict=found.state_dict,
        range_constraints=constraints,
        module_call_graph=found.module_call_graph,
        constants=found.constants,
        verifiers=[load_verifier(name) for name in program.verifiers],
    )


def sides_of_input(members: Mapping[str, bytes], name: str) -> tuple[list[Any], dict[str, int]]:
    """Sides of an input from the third on, as numbers or expressions, and what bounds them above.

    Raises:
        Exception: of any kind, the members are damaged.
    """
    import sympy
    import torch.utils._sympy.functions as by_torch

    model = json.loads(members[MODEL])
    known = constructors(vars(by_torch))
    sides = [
        build_expression(parse_expression(side["as_expr"]["expr_str"]), known)
        if "as_expr" in side
        else side["as_int"]
        for side in model["graph_module"]["graph"]["tensor_values"][name]["sizes"][2:]
    ]
    if not all(isinstance(side, int | sympy.Expr) for side in sides):
        raise TypeError(f"{sides} are no sizes")
    bounds = {size: bound["max_val"] for size, bound in model["range_constraints"].items()}
    return sides, {size: int(most) for size, most in bounds.items() if most is not None}


def _tensor_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Name → description, one object for all that are alike."""
    from torch._export.serde import schema

    make, known = _maker(schema.TensorMeta), {}
    found = {}
    for name, value in values.items():
        text = json.dumps(value)
        if text not in known:
            known[text] = make(value)
        found[name] = known[text]
    return found


def _work_once(deserializer: Any) -> None:
    """Let one of torch's deserializers make each description and each expression once."""
    make_value, enter_expression = (
        deserializer.deserialize_tensor_meta,
        deserializer._parse_sym_expr,
    )
    values: dict[int, Tensor] = {}
    expressions: dict[tuple[str, Any], Any] = {}

    def value(description: Any) -> Tensor:
        key = id(description)
        if key not in values:
            values[key] = make_value(description)
        return values[key]

    def expression(text: Any, hint: Any = None) -> Any:
        if not isinstance(text, str):  # a part of one that is entered
            return enter_expression(text, hint)
        if (text, hint) not in expressions:
            known = constructors(deserializer.sympy_functions)
            built = build_expression(parse_expression(text), known)
            expressions[text, hint] = enter_expression(built, hint)
        return expressions[text, hint]

    deserializer.deserialize_tensor_meta = value
    deserializer._parse_sym_expr = expression


def _weights(members: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Name → placeholder on meta, a parameter where it was one."""
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    weights = {}
    for name, entry in json.loads(members[WEIGHTS])["config"].items():
        meta = entry["tensor_meta"]
        sizes, strides = ([side["as_int"] for side in meta[key]] for key in ("sizes", "strides"))
        dtype = _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]]
        weight = torch.empty_strided(sizes, strides, dtype=dtype, device="meta")
        if entry["is_param"]:
            weight = torch.nn.Parameter(weight, requires_grad=meta["requires_grad"])
        weights[name] = weight
    return weights


@functools.cache
def _maker(kind: Any) -> Make:
    """How a record of torch's schema, or a list, dict or plain value of one, is made from JSON."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (kind,) = (item for item in inner if item is not types.NoneType)
        return lambda data: None if data is None else _maker(kind)(data)
    if origin is list:
        return lambda data: [_maker(inner[0])(item) for item in data]
    if origin is dict:
        return lambda data: {key: _maker(inner[1])(item) for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _record_maker(kind)
    return float if kind is float else lambda data: data


def _record_maker(kind: Any) -> Make:
    from torch._export.serde import schema
    from torch._export.serde.union import _Union

    hints = typing.get_type_hints(kind, globalns=vars(schema))

    def union(data: Mapping[str, Any]) -> Any:
        ((name, value),) = data.items()
        return kind.create(**{name: _maker(hints[name])(value)})

    def record(data: Mapping[str, Any]) -> Any:
        # Keys that this torch does not know are left out, as torch itself does.
        return kind(
            **{name: _maker(hint)(data[name]) for name, hint in hints.items() if name in data}
        )

    return union if issubclass(kind, _Union) else record
