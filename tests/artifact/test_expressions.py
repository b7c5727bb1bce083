"""Sizes are read as sympy would read them, and nothing else is."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import CeilToInt, FloorDiv, IntTrueDiv, PythonMod

from turbo_opt.artifact.expressions import build_expression, constructors, parse_expression

BY_TORCH = {made.__name__: made for made in (CeilToInt, FloorDiv, IntTrueDiv, PythonMod)}
SYMBOLS = [sympy.Symbol(name, positive=True, integer=True) for name in ("s0", "s18", "u3")]
EXPRESSIONS = st.recursive(
    st.sampled_from(SYMBOLS) | st.integers(-1000, 1000).map(sympy.Integer),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(sympy.Min, inner, inner),
        st.builds(lambda a, n: FloorDiv(a, sympy.Integer(n)), inner, st.integers(1, 200)),
        st.builds(lambda a, n: PythonMod(a, sympy.Integer(n)), inner, st.integers(1, 200)),
    ),
    max_leaves=6,
)


def read(text: str) -> sympy.Basic:
    built = build_expression(parse_expression(text), constructors(BY_TORCH))
    return sympy.sympify(built)


@settings(max_examples=60, deadline=None)
@given(expression=EXPRESSIONS)
def test_an_expression_is_read_as_sympy_reads_it(expression: sympy.Basic) -> None:
    text = sympy.srepr(expression)
    assert read(text) == sympy.sympify(text, locals=BY_TORCH)


@pytest.mark.parametrize(
    "condition",
    [sympy.Ge(SYMBOLS[0], 2), sympy.Ne(SYMBOLS[0], SYMBOLS[1]), sympy.true,
     sympy.And(SYMBOLS[0] < 9, SYMBOLS[1] > 2), sympy.Rational(-3, 2)],
)  # fmt: skip
def test_conditions_and_fractions_are_read_too(condition: sympy.Basic) -> None:
    assert read(sympy.srepr(condition)) == condition


@pytest.mark.parametrize(
    "text",
    ["", " ", None, 3, "Add(", "Add", "s18", "__import__('os').system('true')", "eval('1')",
     "Symbol('s0').name", "Symbol('__class__.x')", "Symbol('s0', 's1')", "Symbol()",
     "Symbol('s0', commutative=False)", "Symbol('s0', positive=exit())", "Symbol(*Integer(1))",
     "Integer('1')", "Integer(1.5)", "Integer(1" + "0" * 20 + ")", "Add(1, evaluate=False)",
     "Add(*Integer(1))", "Add(**Integer(1))", "Add(True)", "Add(x := 1)", "(lambda: 1)()",
     "[Integer(1) for _ in true]", "Integer(1) + Integer(1)", "1 if true else 2", "f'{1}'",
     "Add(Add)(1)", "Add(" * 300 + "1" + ")" * 300, "-" * 3000 + "1", "1" * 4001, "\0",
     "Pow(Integer(9), Integer(99999999999))", "Pow(Integer(2), Symbol('s0'))", "Pow(Integer(2))",
     "LShift(Integer(1), Integer(9))", "Pow(Integer(2), Add(Integer(9), Integer(9)))",
     "Pow(" * 9 + "Integer(9)" + ", Integer(8))" * 9, "Pow(Integer(2), 2)"],
)  # fmt: skip
def test_anything_else_is_refused(text: object) -> None:
    with pytest.raises(ValueError):
        parse_expression(text)
