"""The learning rate over a training."""

from __future__ import annotations

import math


def learning_rate(used: float, peak: float, warm_up: float = 0.03, floor: float = 0.01) -> float:
    """Linear warm-up, then a cosine down to `floor` of the peak at the end.

    Args:
        used: share of the training that is done, 0 to 1.
    """
    if used < warm_up:
        return peak * max(used / warm_up, 1e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * (used - warm_up) / (1 - warm_up)))
    return peak * (floor + (1 - floor) * cosine)
