"""One forward of a full-size denoiser: diffusers against the compiled graph, after each pass.

    python -m benchmarks.forward --model 1.3b --out results/
    python -m benchmarks.forward --model 14b --out results/ --only compiled sla-bf16 sagesla-fp8

Random weights of a trained model's scale, random inputs, one clip of 81 frames, all in one run on
one GPU. Every configuration is timed with the same attention backend order. Quality is the SQNR of
the output against eager diffusers in bf16 on the same inputs and weights. Beside each time stands
the least that its arithmetic and its memory traffic would take on this GPU, measured in the run.
"""

from benchmarks.forward.bench import Bench
from benchmarks.forward.cases import CASES, PROMPT_TOKENS, Case
from benchmarks.forward.configurations import PIPELINES, SPARSE_REFERENCE, STEPS, four_steps
from benchmarks.forward.timing import ATTENTION, measure

__all__ = [
    "ATTENTION",
    "CASES",
    "PIPELINES",
    "PROMPT_TOKENS",
    "SPARSE_REFERENCE",
    "STEPS",
    "Bench",
    "Case",
    "four_steps",
    "measure",
]
