"""`turbo-opt`: wires the commands. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os

import click

from turbo_opt._version import __version__
from turbo_opt.cli.group import LazyGroup
from turbo_opt.cli.session import debug_option, quiet_option

_COMMANDS = {
    "run": "turbo_opt.cli.run:run",
    "plan": "turbo_opt.cli.plan:plan",
    "generate": "turbo_opt.cli.generate:generate",
    "verify": "turbo_opt.cli.artifacts:verify",
    "inspect": "turbo_opt.cli.artifacts:inspect",
    "diff": "turbo_opt.cli.artifacts:diff",
    "passes": "turbo_opt.cli.passes:passes",
    "recipes": "turbo_opt.cli.recipes:recipes",
    "bench": "turbo_opt.cli.bench:bench",
    "calibrate": "turbo_opt.cli.calibrate:calibrate",
    "env": "turbo_opt.cli.env:env",
    "reproduce": "turbo_opt.cli.reproduce:reproduce",
    "demo": "turbo_opt.cli.demo:demo",
}


@click.group(
    cls=LazyGroup,
    lazy_commands=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 3 a verification budget was exceeded.",
)
@click.version_option(__version__, message="turbo-opt %(version)s")
@debug_option
@quiet_option
def cli() -> None:
    """Compile Wan video diffusion models ahead of time: capture, optimize, verify, generate."""


def main() -> None:
    """The console script; exits the process."""
    # Large tensors in huge pages: half of the time of a fresh one is page faults otherwise.
    # torch looks at it when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    cli(prog_name="turbo-opt")
