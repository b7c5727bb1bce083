"""The text form of pipelines and the validation of options."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from turbo_opt.compiler import base
from turbo_opt.compiler.base import Numerics, Pass, PassOptions, register_pass
from turbo_opt.compiler.pipeline import (
    PassSpec,
    format_pipeline,
    parse_pipeline,
    validate_options,
)
from turbo_opt.errors import BadInput


class Skip(PassOptions):
    """Layers to leave alone."""

    first: int = Field(default=0, ge=0)
    names: list[str] = Field(default=[])


@pytest.fixture
def quantize_linear(monkeypatch):
    """A registry with one stand-in pass."""
    monkeypatch.setattr(base, "_PASSES", {})
    monkeypatch.setattr(base, "_loaded", True)

    @register_pass
    class QuantizeLinear(Pass):
        name = "quantize-linear"
        numerics = Numerics.QUANTIZES

        class Options(PassOptions):
            scheme: Literal["int8-block", "fp8-block"]
            skip: Skip = Skip()

        def run(self, program, options, context):
            raise NotImplementedError

    return QuantizeLinear


def failure(function, *args) -> str:
    with pytest.raises(BadInput) as caught:
        function(*args)
    return str(caught.value)


def test_text_with_every_kind_of_value_parses():
    text = (
        'canonicalize,quantize-linear?{scheme=fp8-block skip={first=2 names=["*.attn2.*", ffn]}'
        " ratio=0.5 small=1e-3 negative=-4 on=true off=false none=null empty=[] nothing={}}"
    )
    assert parse_pipeline(text) == (
        PassSpec("canonicalize"),
        PassSpec(
            "quantize-linear",
            {
                "scheme": "fp8-block",
                "skip": {"first": 2, "names": ["*.attn2.*", "ffn"]},
                "ratio": 0.5,
                "small": 1e-3,
                "negative": -4,
                "on": True,
                "off": False,
                "none": None,
                "empty": [],
                "nothing": {},
            },
            optional=True,
        ),
    )


def test_white_space_between_tokens_has_no_meaning():
    assert parse_pipeline(" a ,\n b ? {\n x = 1\n y = [ 1 , 2 ] }\n") == parse_pipeline(
        "a,b?{x=1 y=[1, 2]}"
    )


def test_empty_text_is_the_empty_pipeline():
    assert parse_pipeline("  \n") == ()
    assert format_pipeline(()) == ""


def test_text_form_is_the_shortest_that_reads_back():
    spec = PassSpec("q", {"scheme": "fp8-block", "word": "true", "glob": "*.x", "n": 2.0}, True)
    assert str(spec) == 'q?{scheme=fp8-block word="true" glob="*.x" n=2.0}'


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text() | st.from_regex(r"[a-z-]{1,8}")
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
specs = st.builds(
    PassSpec,
    name=st.from_regex(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", fullmatch=True),
    options=st.dictionaries(st.text(), values, max_size=3),
    optional=st.booleans(),
)


def typed(value):
    """`value` with the types of its numbers, since True == 1 == 1.0 and 0.0 == -0.0."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return (type(value), repr(value))


@given(st.lists(specs, max_size=3))
def test_every_pipeline_round_trips_through_its_text_form(pipeline):
    text = format_pipeline(pipeline)
    parsed = parse_pipeline(text)
    assert parsed == tuple(pipeline)
    assert [typed(spec.options) for spec in parsed] == [typed(spec.options) for spec in pipeline]
    assert format_pipeline(parsed) == text


@given(st.text(alphabet='ab-?{}[]=," \n01.e\\*', max_size=30) | st.text(max_size=30))
def test_any_text_either_parses_or_is_bad_input(text):
    try:
        parsed = parse_pipeline(text)
    except BadInput:
        return
    assert parse_pipeline(format_pipeline(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("a,", 3, "expected a pass name, found the end"),
        ("a b", 3, "expected ',' and the next pass, or the end, found 'b'"),
        ("a{x 1}", 5, "expected '=' after option 'x', found '1'"),
        ("a{x=1, y=2}", 6, "options are separated by spaces, not commas"),
        ("a{x=[1]y=2}", 8, "expected a space before the next option"),
        ("a{x=1 x=2}", 7, "option 'x' is given twice"),
        ("a{x=[1 2]}", 8, "expected ',' or ']', found '2'"),
        ("a{x=}", 5, "expected a value, found '}'"),
        ("a{x=1", 6, "expected an option or '}', found the end"),
        ("a{x=1.3b}", 5, "'1.3b' is not a number; put text in double quotes"),
        ("a{x=1e999}", 5, "'1e999' is too large a number"),
        ('a{x="\\q"}', 5, "not a valid string: escapes are those of JSON"),
        ("9a", 1, "expected a pass name, found '9'"),
        ("a{x=" + "[" * 40, 37, "nested more than 32 deep"),
    ],
)
def test_bad_text_is_shown_with_column_and_caret(text, column, message):
    caret = " " * (column - 1) + "^"
    expected = f"pipeline, column {column}: {message}\n  {text}\n  {caret}"
    assert failure(parse_pipeline, text) == expected


def test_bad_text_of_several_lines_is_shown_with_its_line():
    assert failure(parse_pipeline, "a,\nb c\n,d") == (
        "pipeline, line 2, column 3: expected ',' and the next pass, or the end, found 'c'\n"
        "  b c\n"
        "    ^"
    )


def test_origin_takes_no_part_in_equality():
    assert parse_pipeline("a")[0].origin is not None
    assert parse_pipeline(" a") == (PassSpec("a"),)


def test_options_are_a_private_copy():
    given_options = {"names": ["a"]}
    spec = PassSpec("p", given_options)
    given_options["names"].append("b")
    assert spec.options == {"names": ["a"]}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a pass", {}, "'a pass' cannot be a pass name: write it like 'fuse-norms'"),
        ("p", {"x": float("nan")}, "p.x: must be a finite number, got nan"),
        ("p", {"x": {1: 2}}, "p.x: key 1 must be a string"),
        ("p", {"x": [b""]}, "p.x[0]: must be plain data, got b'' (bytes)"),
    ],
)
def test_spec_that_cannot_be_written_is_refused(name, options, message):
    assert failure(PassSpec, name, options) == message


def test_options_are_validated_into_the_type_of_the_pass(quantize_linear):
    spec = parse_pipeline("quantize-linear{scheme=int8-block skip={first=2}}")[0]
    options = validate_options(spec)
    assert isinstance(options, quantize_linear.Options)
    assert options.skip.first == 2


@pytest.mark.usefixtures("quantize_linear")
def test_unknown_pass_names_the_nearest_one_with_a_caret():
    spec = parse_pipeline("a,quantise-linear")[1]
    assert failure(validate_options, spec) == (
        "pipeline, column 3: quantise-linear: unknown pass 'quantise-linear', did you mean "
        "'quantize-linear'? Known: quantize-linear.\n"
        "  a,quantise-linear\n"
        "    ^"
    )


@pytest.mark.usefixtures("quantize_linear")
def test_pass_with_unknown_option_names_the_nearest_one():
    spec = parse_pipeline("quantize-linear{scheme=int8-block skip={fist=1}}")[0]
    text = "quantize-linear{scheme=int8-block skip={fist=1}}"
    assert failure(validate_options, spec) == (
        "pipeline, column 41: quantize-linear.skip.fist: unknown option 'fist', did you mean "
        f"'first'? Known: first, names.\n  {text}\n  {' ' * 40}^"
    )


@pytest.mark.usefixtures("quantize_linear")
def test_value_that_is_not_allowed_names_the_nearest_and_all_allowed():
    spec = PassSpec("quantize-linear", {"scheme": "fp9-block"})
    assert failure(validate_options, spec) == (
        "quantize-linear.scheme: 'fp9-block' is not allowed, did you mean 'fp8-block'? "
        "Allowed: 'int8-block' or 'fp8-block'."
    )


@pytest.mark.usefixtures("quantize_linear")
def test_every_fault_of_the_options_is_told_on_a_line_of_its_own():
    spec = PassSpec("quantize-linear", {"skip": {"first": -1, "names": [True]}})
    assert failure(validate_options, spec).splitlines() == [
        "quantize-linear.scheme: required option is missing",
        "quantize-linear.skip.first: must be greater than or equal to 0, got -1",
        "quantize-linear.skip.names[0]: must be a valid string, got true",
    ]
