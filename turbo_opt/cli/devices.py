"""`--device` of the commands that run networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from turbo_opt.errors import BadInput

F = TypeVar("F", bound=Callable[..., Any])


def device_option(function: F) -> F:
    """`--device auto|cpu|cuda`."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where to run; auto takes a GPU if there is one.",
    )(function)


def resolve_device(name: str) -> str:
    """`cpu` or `cuda`.

    Raises:
        BadInput: a GPU was asked for and there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise BadInput("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    return ("cuda" if there else "cpu") if name == "auto" else name
