"""Clips of every row from the same captions and noise, and what is measured of them."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import turbo_opt
from benchmarks.clip_features import (
    accuracy,
    features_of,
    frechet_distance,
    train_classifier,
)
from benchmarks.students.held_out import HeldOutClips, schedule_of
from benchmarks.students.variants import (
    CLOSED_FORM,
    MERGED,
    RCM,
    SLA,
    STUDENT,
    TEACHER,
    Variant,
)
from turbo_opt.calibration.flow import Sampled
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.networks import build_network, open_denoiser
from turbo_opt.calibration.places import MODEL
from turbo_opt.calibration.sla.attention import Sparsity
from turbo_opt.calibration.sla.closed_form import attend_densely
from turbo_opt.calibration.sla.run import solve_sla
from turbo_opt.calibration.sla.student import (
    PROJECTION,
    add_projections,
    attend_sparsely,
    set_attention,
    zero_projections,
)
from turbo_opt.calibration.tiny_wan.clips import Scene, render
from turbo_opt.calibration.tiny_wan.detectors import score_batch
from turbo_opt.calibration.tiny_wan.evaluate import contact_sheet
from turbo_opt.calibration.tiny_wan.students import job_file
from turbo_opt.calibration.training.world import World
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.runtime.module import CompiledTransformer

_BLOCK = 64
_SAMPLES = 48
"""Clips for the closed form: 32 to solve from, 16 held out, as its job says …"""
_SAID: tuple[str, ...] = ()
"""… or as these overrides do."""
_COMPILED = (
    "canonicalize,fuse-norms,{sparse}fuse-qk-norm-rope,quantize-linear{{scheme={scheme}}},"
    "fuse-norm-quantize,fuse-qkv{{cross_attention=false}},fuse-epilogues,hoist-invariants"
)


class Scorer:
    """Draws the clips of every variant from the same captions and noise, and measures them.

    Args:
        students: folder with `<student>.safetensors`.
        count: clips of held-out captions; combinations are repeated evenly, in other words.
        batch: clips that are sampled at once.

    Attributes:
        student: the file that `student` and `merged` mean.
        captions: how many different captions the clips have.
        drawn: what the classifier and the distance make of drawn clips.
    """

    def __init__(
        self,
        students: Path,
        device: torch.device,
        count: int,
        batch: int,
        classifier_steps: int,
        seed: int = 0,
    ) -> None:
        self._students, self._device, self._batch = students, device, batch
        self._folder = open_denoiser("tiny-wan", "transformer")
        self._clips = HeldOutClips(self._folder, device, count, batch, seed)
        self.scenes, self.captions = self._clips.scenes, self._clips.captions
        self._wanted = [scene.combination for scene in self.scenes]
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._network = build_network(
            self._folder, World(0, 1, device), add_projections, self._zero
        )
        self._weights[TEACHER] = {
            name: value.detach().clone() for name, value in self._network.named_parameters()
        }
        self.student = RCM
        self._classifier = train_classifier(device, classifier_steps, min(128, batch))
        self._pairs = self._of_one_caption()
        self._drawn_clips = drawn = self._drawn(self.scenes)
        others = [Scene.sample(each, seed=other) for other in range(1, 5) for each in self._wanted]
        self._real = features_of(self._classifier, self._drawn(others))
        self.drawn = {
            "classifier_accuracy": accuracy(self._classifier, drawn, self.scenes),
            "frechet": frechet_distance(features_of(self._classifier, drawn), self._real),
        }

    @property
    def _zero(self) -> dict[str, Tensor]:
        return zero_projections(self._folder.config)

    def lacks(self, variant: Variant) -> Path | None:
        """A file that the row's weights are in and that is not there."""
        if variant.weights in (TEACHER, CLOSED_FORM):
            return None
        names = [self._meant(variant.weights)] if variant.weights != MERGED else [self.student, SLA]
        files = [self._file(name) for name in names]
        return next((file for file in files if not file.is_file()), None)

    def _meant(self, weights: str) -> str:
        return self.student if weights == STUDENT else weights

    def _file(self, name: str) -> Path:
        return self._students.absolute() / f"{name}.safetensors"

    def _loaded(self, name: str) -> dict[str, Tensor]:
        """The teacher's weights, or a student's, read or solved when the first row asks."""
        if name not in self._weights:
            found = self._solved() if name == CLOSED_FORM else load_file(self._file(name))
            self._weights[name] = {k: v.float().to(self._device) for k, v in found.items()}
        return self._weights[name]

    def _solved(self) -> dict[str, Tensor]:
        """The teacher with `proj_l` by `calibrate sla --closed-form`, of tiny-wan's own job."""
        with tempfile.TemporaryDirectory() as folder:
            samples, out = Path(folder, "samples"), Path(folder, "solved")
            self._clips.draw_training_samples(_SAMPLES, samples)
            job = load_job(job_file("sla"), SLAJob, [f"data.folder={samples}", *_SAID])
            solve_sla(job, out, World(0, 1, self._device), progress=lambda *_: None)
            return load_file(out / MODEL / "transformer" / "diffusion_pytorch_model.safetensors")

    def _weights_of(self, name: str) -> dict[str, Tensor]:
        if name != MERGED:
            return self._loaded(self._meant(name))
        student, sla, base = (self._loaded(each) for each in (self.student, SLA, TEACHER))
        return {
            name: value if PROJECTION in name else student[name] + (value - base[name])
            for name, value in sla.items()
        }

    def _drawn(self, scenes: Sequence[Scene]) -> Tensor:
        return torch.cat(
            [
                render(scenes[start : start + self._batch], self._device)
                for start in range(0, len(scenes), self._batch)
            ]
        )

    def measure(self, variant: Variant) -> tuple[dict[str, float], Tensor]:
        """Scores, and the clips (B, 3, F, H, W) they are of."""
        started = time.monotonic()
        videos = self._draw(variant)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
        scores = self._clips.shares_right(videos)
        if self._pairs:
            scores["diversity"] = self._difference(videos) / self._difference(self._drawn_clips)
        scores["frechet"] = frechet_distance(features_of(self._classifier, videos), self._real)
        return {**scores, "seconds": seconds}, videos

    def sheet(self, videos: Tensor, path: Path, clips: int = 8) -> None:
        """Some clips under their captions."""
        shown = videos[:clips].cpu()
        right = score_batch(shown, self._wanted[:clips])
        contact_sheet(shown, self._wanted[:clips], right).save(path)

    def _draw(self, variant: Variant) -> Tensor:
        network: Any = self._compiled(variant) if variant.scheme else self._eager(variant)
        schedule = schedule_of(variant, self._folder)
        return self._clips.draw({"transformer": network}, schedule, guided=variant.guided)

    def _eager(self, variant: Variant) -> Sampled:
        own = self._weights_of(variant.weights)
        values = own if variant.tuned and variant.topk is not None else {**own, **self._zero}
        with torch.no_grad():
            for name, parameter in self._network.named_parameters():
                parameter.copy_(values[name])
        if variant.topk is None:
            set_attention(self._network, attend_densely)
        else:
            attend = attend_sparsely(Sparsity(variant.topk, _BLOCK, _BLOCK))
            set_attention(self._network, attend)
        return Sampled(self._network, self._folder.config, torch.bfloat16)

    def _compiled(self, variant: Variant) -> CompiledTransformer:
        recipe = turbo_opt.load_recipe(
            f"tiny-wan/{'h200' if self._device.type == 'cuda' else 'cpu'}",
            ["verify.mode=off", "verify.end_to_end=false"],
        )
        built = turbo_opt.build(recipe.with_passes(parse_pipeline(self._passes(variant))))
        item = built.optimized.denoisers["transformer"]
        return CompiledTransformer.build(
            item.exported, dict(item.weights.items_by_producer()), item.config, self._device
        )

    def _passes(self, variant: Variant) -> str:
        sparse = ""
        text = f'distill-steps{{weights="{self._file(self.student)}"}},'
        if variant.weights == MERGED:
            target = self._file(SLA)
            text += f'merge-weights{{target="{target}" reference="{self._folder.pipeline.path}"}},'
            sparse = f"sparse-attention{{topk={variant.topk} block_q=64 block_k=64}},"
        return text + _COMPILED.format(sparse=sparse, scheme=variant.scheme)

    def _of_one_caption(self) -> list[tuple[int, int]]:
        """All pairs of clips that show one combination."""
        same = defaultdict(list)
        for index, what in enumerate(self._wanted):
            same[what].append(index)
        return [pair for group in same.values() for pair in itertools.combinations(group, 2)]

    def _difference(self, videos: Tensor) -> float:
        """The root mean square difference of the clips of a pair, mean over all pairs."""
        apart = [(videos[i] - videos[j]).square().mean().sqrt() for i, j in self._pairs]
        return float(torch.stack(apart).mean())
