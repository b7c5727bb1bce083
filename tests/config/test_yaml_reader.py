"""YAML from strangers: what is read, where it stands, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from turbo_opt.config import yaml_reader
from turbo_opt.config.document import Location
from turbo_opt.config.lookup import list_recipes
from turbo_opt.config.yaml_reader import MAX_BYTES, read_yaml, read_yaml_file
from turbo_opt.errors import BadInput


def read(text):
    return read_yaml(text, lambda line, column: Location("f", line, column))


def failure(text) -> str:
    with pytest.raises(BadInput) as caught:
        read(text)
    return str(caught.value)


def test_scalars_follow_yaml_1_2():
    text = "[off, yes, 1e-3, 0x10, 0o17, 010, 1_000, 1:30, ~, true, .5, 2024-01-01, '1', =]"
    assert read(text).data == [
        *("off", "yes", 1e-3, 16, 15, 10, "1_000", "1:30", None, True, 0.5, "2024-01-01", "1"),
        "=",
    ]


def test_every_key_and_value_keeps_its_place():
    document = read("a: 1\nb:\n  - x\n  - c: 2\n")
    assert str(document.location(("a",))) == "f:1:4"
    assert str(document.location(("a",), at_key=True)) == "f:1:1"
    assert str(document.location(("b", 1, "c"))) == "f:4:8"
    assert str(document.location(("b", 1, "missing"))) == "f:4:5"


def test_key_given_twice_is_an_error_that_names_both_lines():
    assert failure("a: 1\nb: 2\na: 3") == "f:3:1: key 'a' is given twice (first on line 1)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system [x]", "f:1:4: tag 'python/object/apply:os.system'"),
        ("a: !mine x", "f:1:4: 'x' cannot be read as '!mine'"),
        ("a: !!binary aGk=", "f:1:4: 'aGk=' cannot be read as 'binary'"),
        ("a: !!int x", "f:1:4: 'x' cannot be read as 'int'"),
        ("a: .nan", "f:1:4: '.nan' is not a finite number"),
        ("a: 1e999", "f:1:4: '1e999' is not a finite number"),
        ("1: a", "f:1:1: a key must be text; put it in quotes"),
        ("[a]: b", "f:1:1: a key must be text; put it in quotes"),
        ("a: b: c", "f:1:5: not YAML: mapping values are not allowed here"),
        ("a: [", "f:1:5: not YAML: expected the node content, but found '<stream end>'"),
        ("a: *b", "f:1:4: not YAML: found undefined alias 'b'"),
        ("--- a\n--- b", "f:2:1: not YAML: but found another document"),
        ("a: \0", "f:1:1: not YAML: special characters are not allowed"),
        ("[" * 40, "f:1:33: nested more than 32 deep"),
        ("a: &a [*a]", "f:1:4: too large once aliases are expanded"),
    ],
)
def test_what_a_recipe_has_no_use_for_is_refused_with_its_place(text, message):
    assert failure(text).startswith(message)


def test_aliases_that_explode_are_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert "too large once aliases are expanded: more than 20000 values" in failure(
        "\n".join(lines)
    )


def test_small_aliases_are_expanded():
    assert read("a: &x [1]\nb: *x").data == {"a": [1], "b": [1]}


def test_files_that_are_too_large_or_not_text_are_refused(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(BadInput, match=r"^f: larger than 256 KiB$"):
        read_yaml_file(path, "f")
    path.write_bytes(b"a: \xff")
    with pytest.raises(BadInput, match=r"^f: not UTF-8 text \(byte 3\)$"):
        read_yaml_file(path, "f")
    with pytest.raises(BadInput, match=r"^f: cannot be read \(No such file or directory\)$"):
        read_yaml_file(tmp_path / "g.yaml", "f")


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


class Quoted(yaml.SafeDumper):
    """Text in quotes, since the dumper quotes by the rules of YAML 1.1; no aliases."""

    def ignore_aliases(self, data):
        return True


Quoted.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


@given(plain)
def test_plain_data_round_trips(data):
    assert read(yaml.dump(data, Dumper=Quoted)).data == data


@given(st.text(alphabet="ab:-[]{}&*!#|>'\"%@ \n\t1.,?~", max_size=40) | st.text(max_size=40))
def test_any_text_is_either_read_or_bad_input(text):
    with contextlib.suppress(BadInput):
        read(text)


def read_by_python_alone(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml_reader, "_FAST", yaml_reader._CLEAR)
        return read(text)


def test_libyaml_reads_every_shipped_recipe_as_python_does():
    """Values and places; without libyaml, this compares Python's loader with itself."""
    recipes = list_recipes()
    assert len(recipes) > 50
    for recipe in recipes:
        text = recipe.path.read_text(encoding="utf-8")
        assert read(text) == read_by_python_alone(text), recipe.name


@given(plain)
def test_libyaml_reads_plain_data_as_python_does(data):
    for flow in (True, False):
        text = yaml.dump(data, Dumper=Quoted, default_flow_style=flow, allow_unicode=True)
        assert read(text) == read_by_python_alone(text)
