"""What every set of samples says of how it is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Making:
    """How a set is made.

    Attributes:
        source: the teacher: `tiny-wan`, a diffusers folder or a hub id.
        height, width: in pixels.
        num_frames: 4·n + 1.
        text_length: positions that prompts are padded to.
    """

    source: str
    height: int
    width: int
    num_frames: int
    text_length: int = 512
