"""A whole denoiser before and after all passes: the same seeded input, the real weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.errors import BudgetExceeded
from turbo_opt.ir.program import Denoiser, Program


def compare_end_to_end(
    captured: Program, optimized: Program, *, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Denoiser name → SQNR in dB of the optimized network's output, infinite if bit for bit equal.

    One small clip with random latents and text; both networks run on `device`, one after the
    other, so that one set of weights is in memory at a time. A difference in one evaluation says
    how far rounding carries through all layers; it is reported, not judged.

    Raises:
        BudgetExceeded: the optimized output holds NaN or infinity.
    """
    found = {}
    for name in sorted(captured.denoisers.keys() & optimized.denoisers.keys()):
        before = _output(captured.denoisers[name], seed, device)
        after = _output(optimized.denoisers[name], seed, device)
        if before.isfinite().all() and not after.isfinite().all():
            raise BudgetExceeded(f"{name}: the optimized network's output is not finite")
        found[name] = sqnr_db(before, after)
        if math.isnan(found[name]):
            raise BudgetExceeded(f"{name}: the networks cannot be compared, the SQNR is NaN")
    return found


def _output(denoiser: Denoiser, seed: int, device: torch.device | str) -> Tensor:
    from turbo_opt.artifact.replay import replay_inputs, run_replay
    from turbo_opt.runtime.module import CompiledTransformer

    weights = dict(denoiser.weights.items_by_producer())
    network = CompiledTransformer.build(
        denoiser.exported, weights, denoiser.config, device, denoiser.stages
    )
    inputs = replay_inputs(denoiser.exported, tuple(denoiser.config["patch_size"]), seed)
    return run_replay(network, inputs).float()
