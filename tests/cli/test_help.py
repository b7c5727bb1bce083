"""Help is fast, imports no torch, and names what is near."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.conftest import invoke
from turbo_opt.cli.main import cli

_LIBRARIES = "import click, pydantic, rich.console, rich.table, yaml"
"""What a light command cannot do without."""
_FRUGAL = """
import sys
from turbo_opt.cli.main import cli
sys.argv = ["turbo-opt", *{arguments!r}]
try: cli()
except SystemExit as end: assert not end.code, end.code
assert "torch" not in sys.modules and "diffusers" not in sys.modules
"""


def processor_seconds(code: str) -> float:
    """What a process that runs `code` takes; the first one also compiles what it imports."""
    code += "\nimport time; print('SECONDS', time.process_time())"
    taken = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        taken.append(float(done.stdout.rpartition("SECONDS")[2]))
    return min(taken)


@pytest.fixture(scope="module")
def seconds_of_libraries() -> float:
    return processor_seconds(_LIBRARIES)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["recipes", "list"]])
def test_light_commands_import_no_torch(arguments, seconds_of_libraries):
    # Both of one machine: a second would be much on one, little on another.
    assert processor_seconds(_FRUGAL.format(arguments=arguments)) < 3 * seconds_of_libraries


@pytest.mark.parametrize("name", cli.list_commands(None))  # type: ignore[arg-type]
def test_every_command_has_help_and_a_first_sentence_that_fits_the_overview(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert "--help" in result.stdout
    overview = invoke("--help").stdout
    line = next(line for line in overview.splitlines() if line.startswith(f"  {name} "))
    assert "..." not in line


def test_no_arguments_show_help_and_are_bad_input():
    result = invoke()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


def test_version_is_printed():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("turbo-opt ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "unknown command 'rum', did you mean 'run'?"),
        (["recipes", "lits"], "unknown command 'lits', did you mean 'list'?"),
        (["run", "x", "--ot", "y"], "no such option '--ot'. (Did you mean"),
        (["run", "tiny-wan/cpu"], "missing option '--out'"),
        (["verify"], "missing argument 'ARTIFACT'"),
        (["run", "x", "--out", "y", "--verify", "som"], "'som' is not one of"),
        (["passes", "show", "fuse-norm"], "unknown pass 'fuse-norm', did you mean 'fuse-norms'?"),
        (["recipes", "show", "tiny-wan/cpv"], "did you mean 'tiny-wan/cpu'?"),
    ],
)
def test_wrong_words_are_bad_input_and_name_the_nearest(refused, arguments, message):
    assert message in refused(*arguments)


def test_module_runs_like_the_script_and_ends_silently_when_its_reader_goes():
    command = f"{sys.executable} -m turbo_opt recipes list --json | head -c 10"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[\n  {\n    "
    assert done.stderr == ""
