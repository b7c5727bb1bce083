"""Captioned clips drawn by formula: one flat shape, moving, on a plain background.

A :class:`Scene` says what is seen (shape, colour, motion, background) and, as nuisance, how (size,
place, speed). :func:`caption` and :func:`parse_caption` go between scenes and words, and
:func:`render` draws batches of scenes from signed distance functions, on any device, with exact
one-pixel anti-aliasing. Nothing is random once the scene is given.

Dimensions: B clips, C = 3 channels, F frames, H×W pixels. Videos are (B, C, F, H, W) in [-1, 1].
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FRAMES = 17
SIZE = 96
FPS = 8

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 230),
    "yellow": (245, 220, 50),
    "cyan": (50, 215, 225),
    "magenta": (235, 60, 200),
    "orange": (250, 140, 30),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "blue": (50, 80, 230),
    "green": (40, 170, 70),
    "purple": (105, 40, 150),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")

#: Direction of travel (x to the right, y down) and the factor by which the size changes.
MOTIONS: dict[str, tuple[int, int, float]] = {
    "moves left to right": (1, 0, 1.0),
    "moves right to left": (-1, 0, 1.0),
    "moves up": (0, -1, 1.0),
    "moves down": (0, 1, 1.0),
    "stays still": (0, 0, 1.0),
    "grows": (0, 0, 2.5),
    "shrinks": (0, 0, 0.4),
}

#: The first template is the canonical caption; training mixes in the others.
TEMPLATES = (
    "{article} {colour} {shape} {motion} on a {background} background",
    "{article} {colour} {shape} on a {background} background {motion}",
    "on a {background} background {article} {colour} {shape} {motion}",
    "the {colour} {shape} {motion} on the {background} background",
    "{colour} {shape} {motion}, {background} background",
)
HELD_OUT_PERCENT = 15


class Combination(NamedTuple):
    """What a caption says, and what the detectors score."""

    shape: str
    colour: str
    motion: str
    background: str


@dataclass(frozen=True)
class Scene:
    """One clip. Lengths are in pixels of a 96×96 frame."""

    shape: str
    colour: str
    motion: str
    background: str
    size: float = 14.0
    """Radius scale of the shape in the middle of the clip (geometric mean if it grows)."""
    x: float = 48.0
    """Centre in the middle of the clip."""
    y: float = 48.0
    speed: float = 34.0
    """Distance travelled over the clip; ignored by motions that stay in place."""
    seed: int = 0
    """Where the nuisance values came from; drawing does not use it."""

    @property
    def combination(self) -> Combination:
        return Combination(self.shape, self.colour, self.motion, self.background)

    @classmethod
    def sample(cls, combination: Combination, seed: int) -> Scene:
        """A scene that shows ``combination``, with nuisance values fixed by ``seed``."""
        rng = random.Random(f"{seed}/{caption(combination)}")
        across, along = 8.0, 5.0
        dx, dy, growth = MOTIONS[combination.motion]
        if growth != 1.0:
            size, spread_x, spread_y = rng.uniform(11.5, 13.5), across, across
        elif (dx, dy) == (0, 0):
            size, spread_x, spread_y = rng.uniform(11.0, 16.0), 2 * across, 2 * across
        else:
            size = rng.uniform(11.0, 16.0)
            spread_x, spread_y = (along, across) if dx else (across, along)
        return cls(
            *combination,
            size=size,
            x=SIZE / 2 + rng.uniform(-spread_x, spread_x),
            y=SIZE / 2 + rng.uniform(-spread_y, spread_y),
            speed=rng.uniform(28.0, 40.0),
            seed=seed,
        )


def combinations() -> list[Combination]:
    """Every combination that can be told apart: the shape never has the background's colour."""
    return [
        Combination(*parts)
        for parts in itertools.product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS)
        if parts[1] != parts[3]
    ]


def caption(what: Combination | Scene, template: int = 0) -> str:
    """The caption of a scene, such as "a red circle moves up on a blue background"."""
    return TEMPLATES[template].format(
        article="an" if what.colour[0] in "aeiou" else "a",
        colour=what.colour,
        shape=what.shape,
        motion=what.motion,
        background=what.background,
    )


def captions_of(scenes: Sequence[Scene]) -> list[str]:
    """A caption of each scene, another one whenever a combination comes again.

    The canonical caption first, then the paraphrases in turn, so that all captions differ as long
    as no combination comes more often than there are templates.
    """
    times: Counter[Combination] = Counter()
    found = []
    for scene in scenes:
        found.append(caption(scene, times[scene.combination] % len(TEMPLATES)))
        times[scene.combination] += 1
    return found


def parse_caption(text: str) -> Combination:
    """The combination that a caption of any template describes; ValueError if it is none."""
    for template in TEMPLATES:
        pattern = template.format(
            article="(?:a|an)",
            colour=f"(?P<colour>{'|'.join(COLOURS)})",
            shape=f"(?P<shape>{'|'.join(SHAPES)})",
            motion=f"(?P<motion>{'|'.join(MOTIONS)})",
            background=f"(?P<background>{'|'.join(BACKGROUNDS)})",
        )
        if match := re.fullmatch(pattern, text.strip().lower()):
            return Combination(**match.groupdict())
    raise ValueError(
        f"not a caption of tiny-wan: {text!r}; expected something like "
        f"{caption(Combination('circle', 'red', 'moves left to right', 'blue'))!r}"
    )


def held_out(what: Combination | Scene | str) -> bool:
    """Whether a combination (or the one a caption describes) is kept out of training."""
    combination = parse_caption(what) if isinstance(what, str) else what
    digest = hashlib.sha256(caption(combination).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def sample_scenes(count: int, seed: int, *, split: str) -> list[Scene]:
    """``count`` scenes of one split ("train" or "held-out"), combinations evenly covered."""
    wanted = {"train": False, "held-out": True}[split]
    pool = [each for each in combinations() if held_out(each) is wanted]
    rng = random.Random(f"{split}/{seed}")
    order: list[Combination] = []
    while len(order) < count:
        order += rng.sample(pool, len(pool))
    return [Scene.sample(each, seed=rng.getrandbits(32)) for each in order[:count]]


# --- drawing --------------------------------------------------------------------------------------
# A signed distance function takes offsets from the centre (…, H, W) and a size (…, 1, 1), and is
# negative inside. The sizes of the shapes are chosen so that all look about equally large.


def _circle(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    return torch.hypot(x, y) - size


def _square(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9 * size


def _triangle(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    side = math.sqrt(3) / 2
    return torch.maximum(y, side * x.abs() - y / 2) - 0.74 * size


def _cross(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    long, wide = 1.15 * size, 0.38 * size
    return torch.minimum(torch.maximum(x - long, y - wide), torch.maximum(x - wide, y - long))


def _ring(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.85 * size).abs() - 0.27 * size


_DISTANCE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}

#: Area of each shape at size 1, by which a measured area gives the size back.
UNIT_AREA = {
    "circle": math.pi,
    "square": (2 * 0.9) ** 2,
    "triangle": 3 * math.sqrt(3) * 0.74**2,
    "cross": 8 * 1.15 * 0.38 - (2 * 0.38) ** 2,
    "ring": 4 * math.pi * 0.85 * 0.27,
}


def coverage(shape: str, x: Tensor, y: Tensor, size: Tensor, height: int, width: int) -> Tensor:
    """Share of each pixel that a shape covers.

    ``x``, ``y`` (centre) and ``size`` are in pixels and have any common shape; the result appends
    (height, width) to it.
    """
    rows = torch.arange(height, device=x.device, dtype=x.dtype)[:, None] + 0.5
    columns = torch.arange(width, device=x.device, dtype=x.dtype)[None, :] + 0.5
    x, y, size = (value[..., None, None] for value in (x, y, size))
    return (0.5 - _DISTANCE[shape](columns - x, rows - y, size)).clamp(0, 1)


def scene_table(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """The numbers that :func:`render_table` draws from, one row of 13 per scene.

    Columns: shape index; centre x, y; distance travelled in x, y; size; growth; colour RGB;
    background RGB (in [-1, 1]).
    """
    rows = []
    for scene in scenes:
        dx, dy, growth = MOTIONS[scene.motion]
        rows.append(
            [
                SHAPES.index(scene.shape),
                *(
                    scene.x,
                    scene.y,
                    dx * scene.speed,
                    dy * scene.speed,
                    scene.size,
                    growth,
                ),
                *(channel / 127.5 - 1 for channel in COLOURS[scene.colour]),
                *(channel / 127.5 - 1 for channel in BACKGROUNDS[scene.background]),
            ]
        )
    return torch.tensor(rows, dtype=torch.float32).to(device)


def render_table(
    table: Tensor, frames: int = FRAMES, height: int = SIZE, width: int = SIZE
) -> Tensor:
    """Draw the rows of a :func:`scene_table`: (B, 13) → (B, 3, F, H, W) in [-1, 1]."""
    shape, x, y, dx, dy, size, growth = table[:, :7].unsqueeze(-1).unbind(1)
    phase = torch.linspace(-0.5, 0.5, frames, device=table.device)[None, :]
    scale = min(height, width) / SIZE
    x = (x - SIZE / 2 + dx * phase) * scale + width / 2
    y = (y - SIZE / 2 + dy * phase) * scale + height / 2
    size = size * growth**phase * scale

    covered = torch.zeros(len(table), frames, height, width, device=table.device)
    for index, name in enumerate(SHAPES):
        drawn = coverage(name, x, y, size, height, width)
        covered = torch.where((shape == index)[..., None, None], drawn, covered)
    covered = covered.unsqueeze(1)
    colour, background = (table[:, i : i + 3, None, None, None] for i in (7, 10))
    return torch.lerp(background.expand(-1, -1, frames, height, width), colour, covered)


def render(
    scenes: Sequence[Scene],
    device: torch.device | str = "cpu",
    frames: int = FRAMES,
    height: int = SIZE,
    width: int = SIZE,
) -> Tensor:
    """Draw scenes as one batch of videos (B, 3, F, H, W) in [-1, 1]."""
    return render_table(scene_table(scenes, device), frames, height, width)
