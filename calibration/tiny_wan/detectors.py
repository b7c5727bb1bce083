"""What a video shows, measured from its pixels: background, colour, shape and motion.

Nothing here is learned and nothing depends on the caption:

- background: the median colour of the frames' border, named by the nearest palette entry;
- colour: the mean colour of the pixels farthest from the background;
- shape: each frame's soft mask is compared with every shape drawn at the mask's own centroid and
  area; the best overlap over the clip wins;
- motion: straight lines fitted to the centroid and to the logarithm of the area over time.

A measurement that is not convincing (nothing drawn, no shape fits, a crooked motion) is ``None``
and counts as wrong. Videos are (B, 3, F, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .clips import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE,
    UNIT_AREA,
    Combination,
    Scene,
    coverage,
)

ATTRIBUTES = ("colour", "shape", "motion", "background")

_MIN_CONTRAST = 0.25  # distance in [-1, 1]³ under which nothing is drawn
_MIN_AREA = 40.0  # pixels of a 96×96 frame
_MIN_OVERLAP = 0.6  # intersection over union with the best shape
_MIN_TRAVEL = 16.0  # pixels of a 96×96 frame over the clip
_MAX_DRIFT = 8.0  # the same, of something that stays in place
_MIN_GROWTH = 0.6  # change of log area over the clip
_CHUNK = 16  # videos measured at once, to keep the intermediate masks small


@dataclass(frozen=True)
class Detection:
    """What one video shows; ``None`` where the measurement is not convincing."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None
    overlap: float
    """Intersection over union of the video's mask with the best shape."""
    travel: tuple[float, float]
    """Motion of the centroid over the clip, in pixels of a 96×96 frame (x right, y down)."""
    growth: float
    """Change of the logarithm of the area over the clip."""


def detect(video: Tensor) -> Detection:
    """What one video (3, F, H, W) shows."""
    return detect_batch(video.unsqueeze(0))[0]


def detect_batch(videos: Tensor) -> list[Detection]:
    """What each video of a batch (B, 3, F, H, W) shows."""
    if videos.ndim != 5 or videos.shape[1] != 3:
        raise ValueError(f"videos must be (B, 3, F, H, W), got {tuple(videos.shape)}")
    return [seen for chunk in videos.split(_CHUNK) for seen in _detect_chunk(chunk.float())]


def _detect_chunk(videos: Tensor) -> list[Detection]:
    scale = min(videos.shape[-2:]) / SIZE

    background = _border_colour(videos)
    colour = _foreground_colour(videos, background)
    mask = _soft_mask(videos, background, colour)
    x, y, area = _moments(mask)
    overlap = _overlaps(mask, x, y, area)
    travel = torch.stack([_change(x), _change(y)], dim=1) / scale
    growth = _change(area.clamp(min=1).log())

    drawn = (colour - background).norm(dim=1) > _MIN_CONTRAST
    drawn &= area.amin(dim=1) > _MIN_AREA * scale**2
    best_overlap, best_shape = overlap.max(dim=1)
    background_names = _nearest(background, BACKGROUNDS)
    colour_names = _nearest(colour, COLOURS)

    detections = []
    for i, there in enumerate(drawn.tolist()):
        best = float(best_overlap[i])
        move = (float(travel[i, 0]), float(travel[i, 1]))
        grown = float(growth[i])
        shape = SHAPES[int(best_shape[i])] if there and best > _MIN_OVERLAP else None
        detections.append(
            Detection(
                colour=colour_names[i] if there else None,
                shape=shape,
                motion=_motion(move, grown) if there else None,
                background=background_names[i],
                overlap=best,
                travel=move,
                growth=grown,
            )
        )
    return detections


def score(video: Tensor, wanted: Scene | Combination) -> dict[str, bool]:
    """Which attributes of ``wanted`` one video (3, F, H, W) shows."""
    return score_batch(video.unsqueeze(0), [wanted])[0]


def score_batch(videos: Tensor, wanted: Sequence[Scene | Combination]) -> list[dict[str, bool]]:
    """Which attributes of ``wanted[i]`` the i-th video of a batch shows."""
    if len(videos) != len(wanted):
        raise ValueError(f"{len(videos)} videos cannot be scored against {len(wanted)} scenes")
    return [
        {name: getattr(seen, name) == getattr(want, name) for name in ATTRIBUTES}
        for seen, want in zip(detect_batch(videos), wanted, strict=True)
    ]


def _border_colour(videos: Tensor) -> Tensor:
    border = torch.cat(
        [
            videos[..., :3, :].flatten(2),
            videos[..., -3:, :].flatten(2),
            videos[..., :3].flatten(2),
            videos[..., -3:].flatten(2),
        ],
        dim=2,
    )
    return border.median(dim=2).values


def _foreground_colour(videos: Tensor, background: Tensor) -> Tensor:
    """Mean colour of the half percent of pixels that differ most from the background."""
    pixels = videos.flatten(2)
    distance = (pixels - background[:, :, None]).norm(dim=1)
    index = distance.topk(max(1, distance.shape[1] // 200), dim=1).indices
    return pixels.gather(2, index.unsqueeze(1).expand(-1, 3, -1)).mean(dim=2)


def _soft_mask(videos: Tensor, background: Tensor, colour: Tensor) -> Tensor:
    """How far each pixel is from background (0) to colour (1), with a sharpened edge: (B,F,H,W)."""
    axis = colour - background
    axis = axis / axis.square().sum(dim=1, keepdim=True).clamp(min=1e-3)
    share = torch.einsum("bcfhw,bc->bfhw", videos - background[:, :, None, None, None], axis)
    return ((share - 0.25) / 0.5).clamp(0, 1)


def _moments(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centroid x, y and area of each frame's mask, in pixels: three (B, F)."""
    height, width = mask.shape[-2:]
    rows = torch.arange(height, device=mask.device) + 0.5
    columns = torch.arange(width, device=mask.device) + 0.5
    area = mask.sum(dim=(2, 3))
    x = (mask.sum(dim=2) @ columns) / area.clamp(min=1e-3)
    y = (mask.sum(dim=3) @ rows) / area.clamp(min=1e-3)
    return x, y, area


def _overlaps(mask: Tensor, x: Tensor, y: Tensor, area: Tensor) -> Tensor:
    """Intersection over union with each shape at the mask's centroid and area: (B, shapes)."""
    height, width = mask.shape[-2:]
    overlaps = []
    for name in SHAPES:
        size = (area / UNIT_AREA[name]).sqrt()
        drawn = coverage(name, x, y, size, height, width)
        shared = torch.minimum(mask, drawn).sum(dim=(1, 2, 3))
        overlaps.append(shared / torch.maximum(mask, drawn).sum(dim=(1, 2, 3)).clamp(min=1e-3))
    return torch.stack(overlaps, dim=1)


def _change(values: Tensor) -> Tensor:
    """Change over the clip of the straight line fitted to values over time: (B, F) → (B,)."""
    frames = values.shape[1]
    time = torch.linspace(-0.5, 0.5, frames, device=values.device)
    return values @ time / time.square().sum()


def _motion(travel: tuple[float, float], growth: float) -> str | None:
    dx, dy = travel
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along >= _MIN_TRAVEL:
        if across > along / 2 or abs(growth) > _MIN_GROWTH:
            return None
        if abs(dx) > abs(dy):
            return "moves left to right" if dx > 0 else "moves right to left"
        return "moves down" if dy > 0 else "moves up"
    if along > _MAX_DRIFT:
        return None
    if abs(growth) >= _MIN_GROWTH:
        return "grows" if growth > 0 else "shrinks"
    return "stays still"


def _nearest(colours: Tensor, palette: dict[str, tuple[int, int, int]]) -> list[str]:
    names = list(palette)
    table = torch.tensor([palette[name] for name in names], device=colours.device) / 127.5 - 1
    return [names[i] for i in torch.cdist(colours, table).argmin(dim=1).tolist()]
