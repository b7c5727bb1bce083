"""Compile the Triton kernels of a recipe for GPUs elsewhere: `compile_for.py RECIPE sm89 sm120`.

Triton compiles without a GPU, but asks the driver for its kind and launches what it has compiled. A
driver that names the kind stands in for it, and nothing is launched, so that arguments may be on
meta. Prints, as JSON, GPU → operator → what Triton would launch for the first of its calls: every
configuration that it may choose, and the shared memory that each takes.

A process of its own: Triton decides on import whether it interprets.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MULTIPROCESSORS = 128


@dataclass
class Compiler:
    """Stands in for Triton's driver.

    Attributes:
        gpus: by number, as Triton keeps compiled kernels by the number of a device.
        gpu: the one to compile for.
        config: which configuration is compiled.
        launches: what has been compiled instead of launched.
    """

    gpus: Sequence[str]
    gpu: str = ""
    config: int = 0
    launches: list[dict[str, Any]] = field(default_factory=list)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(self.gpu.removeprefix("sm")), 32)

    def get_current_device(self) -> int:
        return self.gpus.index(self.gpu)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def stand_in(self) -> None:
        """From here on kernels are compiled and not launched, in every configuration."""
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        from turbo_opt.kernels import capability
        from turbo_opt.kernels._triton import tuning

        by_triton = JITFunction.run

        def run(function: Any, *args: Any, warmup: bool = False, **options: Any) -> Any:
            kernel = by_triton(function, *args, warmup=True, **options)
            self.launches.append({"config": self.config, "shared": kernel.metadata.shared})
            return kernel

        def each(problem: Any, configs: Sequence[Any], launch: Any) -> Any:
            for self.config, config in enumerate(configs):
                launch(config)
            self.config = 0
            return configs[0]

        JITFunction.run = run
        driver.set_active(self)
        tuning.fastest = each
        # Before the modules that import them by name.
        capability.capability_of = lambda _: capability.parse_capability(self.gpu)
        capability.multiprocessors = lambda _: MULTIPROCESSORS


def main(recipe_name: str, gpus: Sequence[str]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    os.environ["TURBO_OPT_PROVIDER_TABLE"] = "0"
    compiler = Compiler(gpus)
    compiler.stand_in()

    from turbo_opt.cli.bench_kernels import Call, collect
    from turbo_opt.cli.selection import checked_pipeline, select_recipe
    from turbo_opt.kernels import operator

    recipe, calls = select_recipe(recipe_name), list[Call]()
    collect(recipe_name, recipe, checked_pipeline(recipe), calls)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {gpu: {} for gpu in gpus}
    for compiler.gpu in gpus:
        for call in {call.operator: call for call in reversed(calls)}.values():
            chosen = operator(call.operator)
            if chosen.choose(compiler.gpu, *call.args).provider == "triton":
                compiler.launches = found[compiler.gpu][call.operator] = []
                launch = getattr(importlib.import_module(f"{chosen.package}.triton"), call.operator)
                launch(*call.args)
    return found


if __name__ == "__main__":
    json.dump(main(sys.argv[1], sys.argv[2:]), sys.stdout)
