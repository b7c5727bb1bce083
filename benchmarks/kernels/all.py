"""Check, then time every kernel on the GPU, and print a short table last.

    python -m benchmarks.kernels.all --out DIR [--quick] [--only NAME …]
    python -m benchmarks.kernels.all --out DIR --dry-run      tiny shapes on the CPU

Writes DIR/kernels.json. Exits with 1 if a kernel is too far from its reference.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

BENCHES = [
    "adaln",
    "layer_norm",
    "rms_norm",
    "block_quantize",
    "adaln_quantize",
    "layer_norm_quantize",
    "block_linear",
    "gelu_quantize",
    "linear_gelu_quantize",
    "linear_gated_residual",
    "gated_residual",
    "residual_adaln_quantize",
    "residual_layer_norm_quantize",
    "norm_rope",
    "block_routing",
    "norm_rope_sagesla",
    "norm_rope_sagesla_quantize",
    "cuda_preparation",
    "sagesla",
    "sla",
    "sage_sparse_attention",
    "sla2",
    "sage_attention",
    "padded_attention",
    "padded_attention_quantize",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "attention_jvp",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json")
    parser.add_argument("--quick", action="store_true", help="fewer runs and linear shapes")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES, metavar="NAME")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

    import importlib

    import torch

    from benchmarks.kernels._harness import Session
    from benchmarks.results import merge, tabulate

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run runs tiny shapes on the CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    session = Session(dry=options.dry_run, quick=options.quick)
    print(f"ceilings: {session.copy}, {session.bf16_matmul}, {session.library_matmul}", flush=True)
    for name in options.only:
        start = time.perf_counter()
        importlib.import_module(f"benchmarks.kernels.bench_{name}").bench(session)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        merge(options.out / "kernels.json", session.records)
    print(tabulate(session.records))
    for failure in session.failures:
        print(f"WRONG {failure}")
    return 1 if session.failures else 0


if __name__ == "__main__":
    sys.exit(main())
