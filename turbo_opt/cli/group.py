"""A click group whose commands are imported when they are needed, and whose failures are ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import click

from turbo_opt.cli.failures import run_guarded
from turbo_opt.cli.session import Session
from turbo_opt.errors import BadInput, unknown


class SuggestingGroup(click.Group):
    """Answers an unknown command with the nearest one and all there are."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise BadInput(unknown("command", name, self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


class LazyGroup(SuggestingGroup):
    """The top group.

    Args:
        lazy_commands: name → `module:attribute`, in the order of the help text.
    """

    def __init__(self, *args: Any, lazy_commands: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy_commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order that they were given in."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in self._lazy:
            return None
        module, _, attribute = self._lazy[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def main(  # type: ignore[override]
        self,
        args: Any = None,
        prog_name: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; in standalone mode, exit with the code of its outcome."""
        session = extra.setdefault("obj", Session())
        run = super().main
        if not standalone_mode:
            return run(args, prog_name, standalone_mode=False, **extra)
        sys.exit(run_guarded(session, lambda: run(args, prog_name, standalone_mode=False, **extra)))
