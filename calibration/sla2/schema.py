"""What a job of `turbo-opt calibrate router` says."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from turbo_opt.calibration.jobs.schema import Blocks, Job, Training


class Routing(Blocks):
    """The attention whose router and ratio are trained."""

    choice: Literal["soft", "straight-through"] = Field(
        "soft",
        description="Of blocks, in training. soft: σ(score / temperature + λ), as in the paper. "
        "straight-through: the highest, as when the model runs, with the derivative of the soft "
        "choice; for models whose scores are flat, where a soft choice of everything looks best.",
    )
    temperature: float = Field(0.1, gt=0, description="Of the soft choice.")
    query_blocks: int | None = Field(
        4, ge=1, description="Query blocks of a clip that a step looks at; null looks at all."
    )


class RouterTraining(Training):
    """As for other jobs, at a rate for few weights; each layer learns by itself."""

    steps: int = Field(500, ge=1, description="Steps of the whole training.")
    rate: float = Field(3e-3, gt=0, description="Peak learning rate of AdamW.")
    compile: Literal[False] = Field(
        False, description="Blocks are watched, which compiled ones do not allow."
    )
    context_parallel: Literal[1] = Field(
        1, description="A process sees whole clips: what is trained is small."
    )


class RouterJob(Job):
    """A job of `turbo-opt calibrate router`."""

    job: Literal["router"] = Field(description="`router`: stage 1 of SLA2.")
    router: Routing = Field(default_factory=Routing, description="What is trained.")
    training: RouterTraining = Field(
        default_factory=RouterTraining, description="The training loop."
    )
    samples: None = Field(
        None, description="No clips are drawn: `turbo-opt calibrate sla` does, with the router."
    )
