"""What both trainings share: a budget, a learning rate, a resumable state and one loop."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..training.compiling import compiled
from ..training.rates import learning_rate

LossFunction = Callable[[], dict[str, Tensor]]
"""Draws a batch and returns named scalars; "loss" is the one that is minimised."""


@dataclass(frozen=True)
class Budget:
    """How long a whole training is, however many runs it is split into.

    The learning rate follows the used share of the budget, so any budget ends annealed.
    """

    minutes: float = 10.0
    steps: int | None = None
    """If given, the training is this many steps, whatever the time."""
    stop_after: float | None = None
    """If given, this run stops (resumable) after so many minutes."""

    def used(self, step: int, minutes: float) -> float:
        """Share of the budget that is used, 0 to 1."""
        share = minutes / self.minutes if self.steps is None else step / self.steps
        return min(1.0, share)


class TrainingState:
    """Everything that a resumed training needs: weights, their average, AdamW, noise, counters.

    ``average`` is an exponential moving average of the weights, and is what gets shipped.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        seed: int = 0,
        decay: float = 0.999,
    ) -> None:
        self.model = model
        self.device = device
        self.decay = decay
        self.generator = torch.Generator(device).manual_seed(seed)
        self.step = 0
        self.minutes = 0.0
        self.parameters = dict(model.named_parameters())
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        decays = {
            name: p.ndim >= 2 and "text_encoder" not in name for name, p in self.parameters.items()
        }
        matrices = [p for name, p in self.parameters.items() if decays[name]]
        vectors = [p for name, p in self.parameters.items() if not decays[name]]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": 0.01},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=(0.9, 0.98),
            fused=device.type == "cuda",
        )

    def update(self, loss: Tensor, rate: float) -> None:
        """One step down the gradient of ``loss``, and of the average."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()),
                [p.detach() for p in self.parameters.values()],
                1 - decay,
            )

    def save(self, path: Path) -> None:
        """Write the state as one safetensors file, complete or not at all."""
        tensors = {"generator": self.generator.get_state().clone()}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average[name]
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
        counters = json.dumps({"step": self.step, "minutes": self.minutes})
        temporary = path.with_suffix(".partial")
        save_file(tensors, temporary, metadata={"counters": counters})
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Continue from a state that :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file:
            counters = json.loads(file.metadata()["counters"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.step, self.minutes = counters["step"], counters["minutes"]
        self.generator.set_state(stored["generator"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(stored[f"model.{name}"])
                self.average[name].copy_(stored[f"average.{name}"])
                self.optimizer.state[parameter] = {
                    key: stored[f"optimizer.{key}.{name}"].to(self.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"optimizer.{key}.{name}" in stored
                }
        if self.device.type == "cpu":
            return
        for state in self.optimizer.state.values():
            state["step"] = state["step"].to(self.device, torch.float32)

    def use_average(self) -> None:
        """Replace the model's weights by their average, to evaluate or to ship them."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])


def train(
    state: TrainingState,
    loss_function: LossFunction,
    budget: Budget,
    *,
    peak_rate: float,
    folder: Path,
    name: str,
    log_every: int = 50,
    save_every_minutes: float = 2.0,
) -> bool:
    """Train until the budget or this run's time is used up; True when the budget is.

    Writes ``<name>.state.safetensors`` (resumable) and appends to ``<name>.csv`` (loss curve).
    """
    checkpoint, curve = folder / f"{name}.state.safetensors", folder / f"{name}.csv"
    already = state.minutes
    started = last_save = time.monotonic()
    while True:
        now = time.monotonic()
        state.minutes = already + (now - started) / 60
        used = budget.used(state.step, state.minutes)
        out_of_time = budget.stop_after is not None and now - started > 60 * budget.stop_after
        if used >= 1.0 or out_of_time:
            break
        rate = learning_rate(used, peak_rate)
        terms = loss_function()
        state.update(terms["loss"], rate)
        if state.step % log_every == 0 or state.step == 1:
            values = {key: value.item() for key, value in terms.items()}  # waits for the device
            if not math.isfinite(values["loss"]):
                raise RuntimeError(f"{name}: the loss is {values['loss']} at step {state.step}")
            _log(
                curve,
                {"step": state.step, "minutes": state.minutes, "rate": rate, **values},
            )
        if now - last_save > 60 * save_every_minutes:
            state.save(checkpoint)
            last_save = time.monotonic()
    state.save(checkpoint)
    return used >= 1.0


def faster(
    name: str,
    eager: Callable[..., Any],
    run: Callable[[Callable[..., Any]], object],
    generator: torch.Generator,
) -> Callable[..., Any]:
    """``eager`` or its compiled form, whichever ``run`` finishes sooner with.

    Compilation is an optimisation only: if it fails, its reason is printed and ``eager`` returned.
    What the trials draw from ``generator`` is put back.
    """
    drawn = generator.get_state()
    chosen = _faster(name, eager, run)
    generator.set_state(drawn)
    return chosen


def _faster(
    name: str, eager: Callable[..., Any], run: Callable[[Callable[..., Any]], object]
) -> Callable[..., Any]:
    eager_ms = _milliseconds(lambda: run(eager))
    started = time.monotonic()
    try:
        faster_form = compiled(eager)
        compiled_ms = _milliseconds(lambda: run(faster_form))
    except Exception as error:  # compilers fail in many ways; none may stop a training
        reason = str(error).strip().splitlines()
        print(f"{name}: not compiled ({type(error).__name__}: {reason[0] if reason else ''})")
        return eager
    print(
        f"{name}: {eager_ms:.1f} ms eager, {compiled_ms:.1f} ms compiled "
        f"(compiled in {time.monotonic() - started:.0f} s)",
        flush=True,
    )
    return faster_form if compiled_ms < eager_ms else eager


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bf16 matrix products on float32 master weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    def synchronise() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(3):
        run()
    synchronise()
    started = time.monotonic()
    for _ in range(repeats):
        run()
    synchronise()
    return (time.monotonic() - started) / repeats * 1e3


def _log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{key} {value:.5g}" for key, value in row.items()), flush=True)
