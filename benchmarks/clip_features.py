"""Features of tiny-wan's clips, and how far two sets of clips are apart in them.

A small network learns colour, shape, motion and background from drawn clips of the training split,
in a few hundred steps from a fixed seed. What its last hidden layer gives is compared as the
Fréchet inception distance compares images (arXiv 1706.08500):

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁·Σ₂)^½)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from turbo_opt.calibration.tiny_wan.clips import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Combination,
    Scene,
    render_table,
    sample_scenes,
    scene_table,
)

FEATURES = 64
_FRAMES = slice(0, None, 4)
_NAMES = (list(SHAPES), list(COLOURS), list(MOTIONS), list(BACKGROUNDS))
"""Values of the fields of a Combination, in their order."""
_NOISE = 0.05
_CHUNK = 128


class ClipClassifier(nn.Module):
    """Five frames of a 96×96 clip, at half their size, into logits of each attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (15, 32, 64, 64)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.SiLU()]
        self.body = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(widths[-1] * 36, FEATURES), nn.SiLU()
        )
        self.heads = nn.ModuleList(nn.Linear(FEATURES, len(names)) for names in _NAMES)

    def features(self, videos: Tensor) -> Tensor:
        """(B, FEATURES) of videos (B, 3, 17, 96, 96) in [-1, 1]."""
        return self.body(avg_pool2d(videos[:, :, _FRAMES].flatten(1, 2), 2))  # type: ignore[no-any-return]

    def forward(self, videos: Tensor) -> list[Tensor]:
        """Logits of shape, colour, motion and background."""
        hidden = self.features(videos)
        return [head(hidden) for head in self.heads]


def train_classifier(device: torch.device, steps: int = 400, batch: int = 128) -> ClipClassifier:
    """A classifier of drawn clips, from a fixed seed."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        network = ClipClassifier().to(device)
        scenes = sample_scenes(steps * batch, seed=7, split="train")
        table, labels = scene_table(scenes, device), _labels(scenes, device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for rows, wanted in zip(table.split(batch), labels.split(batch), strict=True):
            videos = render_table(rows)
            videos += _NOISE * torch.randn_like(videos)
            loss = sum(
                cross_entropy(logits, wanted[:, i]) for i, logits in enumerate(network(videos))
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            rates.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: ClipClassifier, videos: Tensor, wanted: Sequence[Scene]) -> float:
    """The share of attributes that the classifier names rightly."""
    labels = _labels(wanted, videos.device)
    found = [
        torch.stack([logits.argmax(1) for logits in network(chunk)], 1)
        for chunk in videos.split(_CHUNK)
    ]
    return float((torch.cat(found) == labels).double().mean())


@torch.no_grad()
def features_of(network: ClipClassifier, videos: Tensor) -> Tensor:
    """(B, FEATURES) float64, on the CPU."""
    return torch.cat([network.features(chunk) for chunk in videos.split(_CHUNK)]).cpu().double()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Of two sets of features (N, FEATURES); at least two clips each."""
    means, covariances = zip(*((x.mean(0), torch.cov(x.mT)) for x in (one, other)), strict=True)
    root = _root(covariances[0])
    # (Σ₁·Σ₂)^½ has the eigenvalues of the symmetric (Σ₁^½·Σ₂·Σ₁^½)^½.
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    apart = (means[0] - means[1]).square().sum()
    return float(apart + covariances[0].trace() + covariances[1].trace() - 2 * shared)


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp_min(0).sqrt() @ vectors.mT


def _labels(scenes: Sequence[Scene | Combination], device: torch.device) -> Tensor:
    """(N, 4): which value of each attribute."""
    rows = [
        [names.index(value) for names, value in zip(_NAMES, _combination(each), strict=True)]
        for each in scenes
    ]
    return torch.tensor(rows, device=device)


def _combination(what: Scene | Combination) -> Combination:
    return what.combination if isinstance(what, Scene) else what
