"""Every configuration of one model, measured and recorded one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import results
from benchmarks.forward.bench import Bench
from benchmarks.forward.cases import Case
from benchmarks.forward.configurations import PIPELINES, SPARSE_REFERENCE, STEPS
from benchmarks.forward.floors import Computation, Rates, floor, measured_rates
from benchmarks.forward.rivals import RIVALS, attending_as, missing, replaced_bytes
from benchmarks.forward.timing import measure
from benchmarks.kernels._harness import Session, Timing, sqnr_db

EAGER, COMPILED = "diffusers-eager", "diffusers-compiled"
ONLY = (EAGER, "compiled", "rivals", *PIPELINES)
"""What may be asked for by name; eager diffusers always runs, as all are compared with it."""
EVALUATIONS = 100
"""Of the original: 50 guided steps."""


@dataclass
class Run:
    """One model in one run: what is measured, against what, and where the records go."""

    bench: Bench
    rates: Rates
    out: Path
    baseline: dict[str, float] = field(default_factory=dict)

    def keep(
        self,
        name: str,
        timing: Timing,
        peak: int,
        *,
        forwards: int = 1,
        quality: Mapping[str, float] | None = None,
        baseline: Mapping[str, float] | None = None,
        weight_bytes: int = 0,
        computation: Computation | None = None,
    ) -> None:
        """Print one line and write one record.

        Args:
            peak: bytes; without the reference's weights where the compiled graph has its own.
            forwards: evaluations that were timed: one, or the steps of a clip.
            computation: what the floor counts; None: that of the pipeline of that name.
        """
        session, case = self.bench.session, self.bench.case
        quality = quality or {}
        metric = "forward_ms" if forwards == 1 else "four_steps_ms"
        print(
            f"{name:20s} {metric:14s} {timing.ms:10.1f} ms ± {timing.spread_ms:.1f}  "
            f"{', '.join(f'{k} {v:.1f}' for k, v in quality.items())}  "
            f"peak {peak / 2**30:.1f} GiB  weights {weight_bytes / 2**30:.2f} GiB",
            flush=True,
        )
        computation = computation or Computation.of(PIPELINES.get(name, ""))
        least = floor(case, computation, self.rates, forwards)
        record = session.add(
            f"{case.name}/{name}/{metric}",
            timing.ms,
            "ms",
            timing.spread_ms,
            timing.runs,
            ceiling=least,
            share_of_ceiling=least.value / timing.ms,
            baseline=dict(self.baseline if baseline is None else baseline),
            quality=quality,
            config=self._config(name, peak, weight_bytes),
        )
        results.merge(self.out / "forward.json", [record])

    def _config(self, name: str, peak: int, weight_bytes: int) -> dict[str, Any]:
        return {
            "pipeline": PIPELINES.get(name, name),
            "peak_gib": peak / 2**30,
            "weight_gib": weight_bytes / 2**30,
            "latent": list(self.bench.case.latent),
            "prompt_tokens": self.bench.case.prompt_tokens,
        }


def run(case: Case, session: Session, only: Sequence[str], out: Path) -> None:
    """Measure every configuration of one model, or those of `only`; each record is written as soon
    as it is known."""
    rates = measured_rates(case, session)
    bench = Bench(case, session)
    this = Run(bench, rates, out)
    reference = _diffusers(this, compiled=not only or "compiled" in only)
    if not only or "rivals" in only:
        _rivals(this, reference)
    references = {"eager_bf16": reference}
    for name in PIPELINES:
        if not only or name in only:
            _optimized(this, name, references)
            bench.collect()


def _diffusers(this: Run, *, compiled: bool) -> Tensor:
    """The baselines; returns the output of eager diffusers."""
    bench = this.bench
    few = 2 if bench.case.runs > 3 else 1
    timing, reference, peak = measure(bench, bench.eager(), few)
    this.keep(EAGER, timing, peak)
    this.baseline[EAGER] = timing.ms
    if compiled:
        timing, output, peak = measure(bench, bench.compiled(), few)
        quality = {"sqnr_db_vs_eager_bf16": sqnr_db(reference, output)}
        this.keep(COMPILED, timing, peak, quality=quality)
        this.baseline[COMPILED] = timing.ms
        bench.release_reference()
    return reference


def _rivals(this: Run, reference: Tensor) -> None:
    """What else makes diffusers' model fast; it is not itself any more after that."""
    bench, few = this.bench, 2 if this.bench.case.runs > 3 else 1
    for rival in RIVALS:
        if reason := missing(rival, bench.device):
            print(f"{rival.name} is left out: {reason}", flush=True)
            continue
        rival.change(bench.model.blocks)
        with attending_as(rival):
            timing, output, peak = measure(bench, bench.compiled(), few)
        quality = {"sqnr_db_vs_eager_bf16": sqnr_db(reference, output)}
        peak -= replaced_bytes(bench.model, bench.weights)
        this.keep(rival.name, timing, peak, quality=quality, computation=rival.computation)
        this.baseline[rival.name] = timing.ms
        bench.release_reference()


def _optimized(this: Run, name: str, references: dict[str, Tensor]) -> None:
    """One pipeline: a forward, and the steps of a clip where the whole pipeline is there."""
    bench, pipeline = this.bench, PIPELINES[name]
    module, weight_bytes = bench.optimized(pipeline)
    reference_bytes = sum(tensor.nbytes for tensor in bench.weights.values())
    shared = reference_bytes if weight_bytes < reference_bytes else 0
    timing, output, peak = measure(bench, bench.call(module), warmup=3)
    if name == SPARSE_REFERENCE:
        references["sla_bf16"] = output
    against = "sla_bf16" if "sparse-attention" in pipeline else "eager_bf16"
    quality = {}
    if against in references:
        quality[f"sqnr_db_vs_{against}"] = sqnr_db(references[against], output)
    this.keep(name, timing, peak - shared, quality=quality, weight_bytes=weight_bytes)
    if "hoist-invariants" in pipeline:
        original = {key: EVALUATIONS * ms for key, ms in this.baseline.items()}
        timing, _, peak = measure(bench, bench.clip(module), warmup=1)
        this.keep(
            name, timing, peak - shared,
            forwards=STEPS, baseline=original, weight_bytes=weight_bytes,
        )  # fmt: skip
