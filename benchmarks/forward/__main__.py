"""Command line; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import benchmarks.forward
from benchmarks import results
from benchmarks.forward.cases import CASES, PROMPT_TOKENS
from benchmarks.forward.run import ONLY, run
from benchmarks.kernels._harness import Session


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forward",
        description=benchmarks.forward.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=sorted(CASES), default="1.3b")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument(
        "--only", nargs="*", default=[], choices=ONLY, metavar="NAME",
        help=f"configurations to measure: {', '.join(ONLY)}",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-tokens", type=int, choices=range(1, 513), metavar="N",
        help=f"of the prompt's 512 positions; {PROMPT_TOKENS} unless said",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true",
        help="on the CPU, with --model tiny: proves that the script runs",
    )  # fmt: skip
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run --model tiny runs on the CPU", file=sys.stderr)
        return 2
    session = Session(dry=options.dry_run)
    case = CASES[options.model]
    if options.prompt_tokens is not None:
        case = case.with_prompt(options.prompt_tokens)
    run(case, session, options.only, options.out)
    print(results.tabulate(session.records))
    print(json.dumps(session.environment))
    return 0


if __name__ == "__main__":
    sys.exit(main())
