"""What a job of `turbo-opt calibrate rcm` says."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from turbo_opt.calibration.jobs.schema import (
    Data,
    Decay,
    Job,
    Samples,
    Section,
    SparseLinear,
    Student,
    Training,
)
from turbo_opt.ir.rcm import MOST_STEPS, SIGMA_MAX


class Forward(Section):
    """The forward term: consistency along the teacher's path, on the data's noisy clips."""

    form: Literal["continuous", "discrete"] = Field(
        "continuous",
        description="continuous: by the derivative of F along the path (sCM). discrete: two "
        "neighbours on the path agree (dCM).",
    )
    tangent: Literal["jvp", "difference"] = Field(
        "jvp",
        description="Of the continuous form. jvp: forward-mode derivative, exact. difference: one "
        "more evaluation; any attention, several processes to a clip.",
    )
    step: float | None = Field(
        None,
        gt=0,
        le=0.5,
        description="Angle between the neighbours; null takes 0.05 for difference and 0.2 for "
        "discrete, which carries errors along from neighbour to neighbour.",
    )
    weight: float = Field(100.0, gt=0, description="Weight beside the reverse term.")
    log_sigma_mean: float = Field(
        -0.8, description="Mean of ln σ, whose arc tangent is the trained angle."
    )
    log_sigma_std: float = Field(1.6, gt=0, description="Standard deviation of ln σ.")

    @property
    def angle_apart(self) -> float:
        """`step`, or the default of the form."""
        return self.step or (0.05 if self.form == "continuous" else 0.2)

    @property
    def needs_jvp(self) -> bool:
        """Whether the student must carry tangents."""
        return self.form == "continuous" and self.tangent == "jvp"


class Reverse(Section):
    """The reverse term: distribution matching on the student's own samples, after the warm-up."""

    weight: float = Field(1.0, gt=0, description="Weight beside the forward term.")
    student_every: int = Field(
        5, ge=2, description="The student is updated every so many steps, the fake score in others."
    )
    fake_rate: float = Field(
        0.2, gt=0, description="The fake score's learning rate, as a share of training.rate."
    )
    rollout_steps: int = Field(
        MOST_STEPS, ge=1, le=MOST_STEPS, description="Samples are made in 1 to so many steps."
    )


class Distillation(Section):
    """What is distilled, and by which terms."""

    guidance_scale: float = Field(
        5.0, ge=1, description="The teacher's guidance, which the student takes in; 1 is none."
    )
    warm_up: int = Field(
        1000, ge=0, description="Steps in which the tangent comes in, before the reverse term."
    )
    sigma_max: float = Field(
        SIGMA_MAX,
        gt=math.tan(1.5),
        description="Noise level of the first step: 80 for text to video.",
    )
    forward: Forward = Field(default_factory=Forward, description="Consistency.")
    reverse: Reverse | None = Field(
        default_factory=Reverse,
        description="Distribution matching; null trains without it, and without a fake score.",
    )


class RCMData(Data):
    """As for other jobs, but prompts are kept: the student needs no empty ones."""

    unconditional_share: float = Field(
        0.0, ge=0, le=1, description="Share of prompts replaced by the empty one."
    )


class RCMTraining(Training):
    """As for other jobs, with the rates of rCM's 1.3B student."""

    steps: int = Field(10_000, ge=1, description="Steps of the whole training, of both networks.")
    rate: float = Field(2e-6, gt=0, description="Peak learning rate of the student's AdamW.")
    betas: tuple[Decay, Decay] = Field(
        (0.0, 0.999), strict=False, description="Decay of AdamW's two averages."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay of matrices.")
    gradient_clip: float = Field(
        1e9, gt=0, description="Largest norm of the gradient. Losses are sums: none comes near it."
    )
    average: float | None = Field(
        0.999, gt=0, lt=1, description="Decay of a moving average of the weights; null keeps none."
    )


class RCMSamples(Samples):
    """Clips as the student is sampled: unguided, by rCM's times and rule."""

    num_inference_steps: int = Field(
        MOST_STEPS, ge=1, le=MOST_STEPS, description="Steps of a clip."
    )
    guidance_scale: Literal[1] = Field(1, description="A student is not guided.")


class RCMJob(Job):
    """A job of `turbo-opt calibrate rcm`."""

    job: Literal["rcm"] = Field(description="`rcm`: distillation into one to four steps.")
    data: RCMData = Field(description="What is learned from.")
    training: RCMTraining = Field(default_factory=RCMTraining, description="The training loop.")
    samples: RCMSamples | None = Field(None, description="Clips during training; null makes none.")
    student: Student = Field(default_factory=Student, description="The model that is trained.")
    sla: SparseLinear | None = Field(
        None, description="The student's self-attention while it distils; null leaves it dense."
    )
    rcm: Distillation = Field(default_factory=Distillation, description="The distillation.")

    @model_validator(mode="after")
    def _fits_together(self) -> RCMJob:
        reason = None
        if self.rcm.forward.needs_jvp and self.sla is not None:
            reason = "sparse attention has no forward-mode derivative"
        elif self.rcm.forward.needs_jvp and self.training.context_parallel > 1:
            reason = "heads are exchanged by training.context_parallel without its derivative"
        elif self.rcm.forward.needs_jvp and self.training.compile:
            reason = "blocks compiled by training.compile have no forward-mode derivative"
        if reason:
            raise ValueError(f"{reason}: set rcm.forward.tangent to 'difference'")
        if self.rcm.reverse is not None and self.rcm.warm_up >= self.training.steps:
            raise ValueError(
                f"rcm.warm_up of {self.rcm.warm_up} steps leaves none of training.steps, "
                f"{self.training.steps}, to the reverse term: lower it, or set rcm.reverse to null"
            )
        return self
