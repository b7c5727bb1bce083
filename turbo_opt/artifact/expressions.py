"""Symbolic sizes as torch.export writes them: `Mul(Integer(2), Symbol('s18', positive=True))`.

torch reads them by `sympy.sympify`, which is Python's `eval`. Here they are parsed, and only calls
of known constructors, whole numbers and names of symbols mean anything.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

CONSTRUCTORS = frozenset({
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Min", "Max", "Mod", "Abs",
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt",
    "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv",
    "TruncToFloat", "TruncToInt", "RoundToInt", "ToFloat", "Identity", "Equality",
    "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan", "And",
    "Or", "Not", "Eq", "Ne", "Ge", "Le", "Gt", "Lt",
})  # fmt: skip
_TRUTHS = frozenset({"true", "false"})
_ASSUMPTIONS = frozenset({"positive", "integer", "nonnegative", "real"})
_SYMBOL = re.compile(r"[A-Za-z]\w{0,30}")
_LONGEST = 4000
_LARGEST = 10**20
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
_HIGHEST, _MOST_POWERS = 8, 8  # sympy works powers of numbers out: 67 · 8⁸ bits at the most


def parse_expression(text: Any) -> ast.expr:
    """The checked syntax tree of an expression over sizes; nothing of it is evaluated.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ValueError("no expression, or too long for one")
    try:
        tree = ast.parse(text, mode="eval").body
        _check(tree)
        _check_powers(tree)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not an expression") from None
    return tree


def constructors(by_torch: Mapping[str, Any]) -> dict[str, Any]:
    """Name → what it stands for: torch's own functions of sizes, the others sympy's."""
    import sympy

    names = CONSTRUCTORS | _TRUTHS
    known = {name: getattr(sympy, name) for name in names if hasattr(sympy, name)}
    return known | {name: by_torch[name] for name in names if name in by_torch}


def build_expression(tree: ast.expr, known: Mapping[str, Any]) -> Any:
    """The expression of a tree by `parse_expression`, from `constructors`."""
    if isinstance(tree, ast.Call):
        assert isinstance(tree.func, ast.Name)
        arguments = [build_expression(argument, known) for argument in tree.args]
        assumptions = {str(item.arg): ast.literal_eval(item.value) for item in tree.keywords}
        return known[tree.func.id](*arguments, **assumptions)
    if isinstance(tree, ast.Name):
        return known[tree.id]
    return ast.literal_eval(tree)


def _check(tree: ast.expr) -> None:
    if isinstance(tree, ast.Call):
        if not isinstance(tree.func, ast.Name) or tree.func.id not in CONSTRUCTORS:
            raise ValueError("calls something that makes no size")
        if tree.func.id == "Symbol":
            _check_symbol(tree)
            return
        if tree.keywords:
            raise ValueError("a named argument")
        for argument in tree.args:
            _check(argument)
    elif isinstance(tree, ast.Name):
        if tree.id not in _TRUTHS:
            raise ValueError(f"an unknown name {tree.id!r}")
    else:
        number = tree.operand if _is_negative(tree) else tree
        if not (isinstance(number, ast.Constant) and type(number.value) is int):
            raise ValueError("neither a call nor a whole number")
        if number.value >= _LARGEST:
            raise ValueError("a number that is no size")


def _check_powers(tree: ast.expr) -> None:
    """Of an expression that is checked otherwise: that sympy does not work on it for ever."""
    calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call)]
    powers = [call for call in calls if _name(call) in _POWERS]
    if len(powers) > _MOST_POWERS:
        raise ValueError(f"more than {_MOST_POWERS} powers")
    for power in powers:
        exponent = _whole_number(power.args[1]) if len(power.args) == 2 else None
        if exponent is None or abs(exponent) > _HIGHEST:
            raise ValueError(f"a power that is no number up to {_HIGHEST}")


def _whole_number(tree: ast.expr) -> int | None:
    """n of `Integer(n)`."""
    if not isinstance(tree, ast.Call) or _name(tree) != "Integer" or len(tree.args) != 1:
        return None
    number = tree.args[0]
    return None if isinstance(number, ast.Call | ast.Name) else int(ast.literal_eval(number))


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _is_negative(tree: ast.expr) -> TypeGuard[ast.UnaryOp]:
    return isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub)


def _check_symbol(tree: ast.Call) -> None:
    names = [argument.value for argument in tree.args if isinstance(argument, ast.Constant)]
    if len(tree.args) != 1 or not (names and isinstance(names[0], str)):
        raise ValueError("a symbol without a name")
    if not _SYMBOL.fullmatch(names[0]):
        raise ValueError(f"a symbol with the name {names[0]!r}")
    for item in tree.keywords:
        value = item.value.value if isinstance(item.value, ast.Constant) else None
        if item.arg not in _ASSUMPTIONS or type(value) is not bool:
            raise ValueError("a symbol with an unknown assumption")
