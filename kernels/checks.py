"""Checks of operator arguments that several operators share. They serve real and fake tensors."""

from __future__ import annotations

import torch

from .errors import OperatorInputError

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_activation(operator: str, x: torch.Tensor, rank: int | None = None) -> None:
    """`x` must be bfloat16, float16 or float32, and of that rank if one is given."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise OperatorInputError(
            f"{operator}: x must be bfloat16, float16 or float32, got {x.dtype}"
        )
    if x.ndim == 0 or (rank is not None and x.ndim != rank):
        wanted = f"{rank} dimensions" if rank is not None else "at least one dimension"
        raise OperatorInputError(f"{operator}: x must have {wanted}, got shape {tuple(x.shape)}")


def check_channels(operator: str, name: str, vector: torch.Tensor | None, x: torch.Tensor) -> None:
    """`vector`, if given, must be (C,) in float32 or in x's dtype."""
    if vector is None:
        return
    _check_parameter_dtype(operator, name, vector, x)
    if vector.ndim != 1 or vector.shape[0] != x.shape[-1]:
        raise OperatorInputError(
            f"{operator}: {name} must have shape ({x.shape[-1]},), got {tuple(vector.shape)}"
        )


def check_modulation(operator: str, name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    """`value` must be (B or 1, L or 1, C) in float32 or in x's dtype, for x of (B, L, C)."""
    _check_parameter_dtype(operator, name, value, x)
    fits = value.ndim == 3 and all(
        (isinstance(size, int) and size == 1) or size == full
        for size, full in zip(value.shape[:2], x.shape[:2], strict=True)
    )
    if not fits or value.shape[-1] != x.shape[-1]:
        raise OperatorInputError(
            f"{operator}: {name} must have shape (B or 1, L or 1, C) for x of shape "
            f"{tuple(x.shape)}, got {tuple(value.shape)}"
        )


def _check_parameter_dtype(
    operator: str, name: str, parameter: torch.Tensor, x: torch.Tensor
) -> None:
    if parameter.dtype is not torch.float32 and parameter.dtype is not x.dtype:
        raise OperatorInputError(
            f"{operator}: {name} must be float32 or {x.dtype} as x is, got {parameter.dtype}"
        )


def check_rotation(operator: str, cos: torch.Tensor, sin: torch.Tensor, x: torch.Tensor) -> None:
    """`cos` and `sin` must be (1, L, 1, D / 2) float32 for x of (B, L, H·D)."""
    for name, table in (("cos", cos), ("sin", sin)):
        fits = (
            table.ndim == 4
            and table.dtype is torch.float32
            and table.shape[0] == 1
            and table.shape[1] == x.shape[1]
            and table.shape[2] == 1
            and table.shape[3] == cos.shape[-1]
        )
        if not fits:
            raise OperatorInputError(
                f"{operator}: {name} must be float32 of shape (1, {x.shape[1]}, 1, D / 2), got "
                f"{table.dtype} of shape {tuple(table.shape)}"
            )
    if x.shape[-1] % (2 * cos.shape[-1]):
        raise OperatorInputError(
            f"{operator}: {x.shape[-1]} channels are not whole heads of {2 * cos.shape[-1]}"
        )


def check_residual(
    operator: str, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None
) -> None:
    """`y` must be as x, (B, L, C), and `gate`, if given, a modulation of it."""
    check_activation(operator, x, rank=3)
    same = y.ndim == 3 and all(a == b for a, b in zip(y.shape, x.shape, strict=True))
    if y.dtype is not x.dtype or not same:
        raise OperatorInputError(
            f"{operator}: y must be {x.dtype} of shape {tuple(x.shape)} as x is, got {y.dtype} of "
            f"shape {tuple(y.shape)}"
        )
    if gate is not None:
        check_modulation(operator, "gate", gate, x)
