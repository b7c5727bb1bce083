"""What a calibration job says. Sections that every job has, and the jobs themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Unknown keys are errors; text is never taken for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Teacher(Section):
    """The frozen model that is imitated."""

    source: str = Field(
        "tiny-wan",
        min_length=1,
        description="`tiny-wan`, a diffusers folder (relative to this file), or a hub id.",
    )
    denoiser: Literal["transformer", "transformer_2"] = Field(
        "transformer", description="Which network of a model that has two."
    )


class Data(Section):
    """Clips to learn from, as `turbo-opt calibrate data` makes them."""

    folder: str = Field(
        min_length=1,
        description="Folder of samples, with index.json or of tar shards, relative to this file.",
    )
    held_out: int = Field(
        4, ge=0, description="Samples at the end of the index that are only evaluated on."
    )
    broken_share: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Share of samples that may be unreadable and skipped before the job stops.",
    )
    unconditional_share: float = Field(
        0.1, ge=0, le=1, description="Share of prompts replaced by the empty one, for guidance."
    )
    resident: bool = Field(
        False,
        description="Keep all samples in the device's memory, instead of reading each step's.",
    )


class Noise(Section):
    """Noise levels t of x_t = (1 − t)·x₀ + t·ε, in [low, high]: uniform before the shift."""

    shift: float | None = Field(
        None, gt=0, description="t ← s·t / (1 + (s − 1)·t); null takes the model's flow_shift."
    )
    low: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Lowest t; null takes 0, or the model's boundary_ratio for the first of two "
        "experts.",
    )
    high: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Highest t; null takes 1, or the model's boundary_ratio for transformer_2.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Noise:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class Training(Section):
    """How long, how fast and in what precision."""

    steps: int = Field(1000, ge=1, description="Steps of the whole training.")
    minutes: float | None = Field(
        None,
        gt=0,
        description="Wall-clock budget of the whole training, over all of its runs. The rate "
        "follows the used share of it, so it ends annealed; `steps` is then the most.",
    )
    batch: int = Field(8, ge=1, description="Samples per step, over all processes.")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Samples per forward of one process; null takes its whole share of `batch`.",
    )
    rate: float = Field(1e-5, gt=0, description="Peak learning rate of AdamW.")
    warm_up: float = Field(
        0.03, ge=0, lt=1, description="Share of the steps in which the rate rises."
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.98), strict=False, description="Decay of AdamW's two averages."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay of matrices.")
    gradient_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    average: float | None = Field(
        None, gt=0, lt=1, description="Decay of a moving average of the weights; null keeps none."
    )
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Precision of products; weights are kept in float32."
    )
    activations: Literal["keep", "selective", "recompute"] = Field(
        "selective",
        description="What backward finds: all activations; attention's results, the rest of each "
        "block computed again; or only each block's input.",
    )
    compile: bool = Field(
        False,
        description="Run each block through torch.compile: fewer passes over memory, for a minute "
        "at the start. Needs a C++ compiler on a CPU.",
    )
    context_parallel: int = Field(
        1, ge=1, description="Processes that share the tokens of a clip, by heads in attention."
    )
    seed: int = Field(0, ge=0, description="Of the order of samples and of all noise.")
    draws: Literal["sample", "batch"] = Field(
        "sample",
        description="What noise is drawn for: each sample, on the CPU, the same on every device "
        "and number of processes; or a whole batch at once on the device, which large batches of "
        "a small model need.",
    )


class Saving(Section):
    """Checkpoints to resume from."""

    every: int = Field(200, ge=1, description="Steps from one checkpoint to the next.")
    keep: int = Field(2, ge=1, description="Checkpoints that are kept.")
    asynchronous: bool = Field(True, description="Write while training goes on.")


class Logging(Section):
    """What is written down on the way."""

    every: int = Field(10, ge=1, description="Steps from one row of the log to the next.")
    evaluate_every: int = Field(100, ge=1, description="Steps between losses on held-out samples.")
    tensorboard: bool = Field(False, description="Also write TensorBoard events.")


class Samples(Section):
    """Clips generated during training."""

    every: int = Field(500, ge=1, description="Steps from one set of clips to the next.")
    prompts: tuple[str, ...] = Field(min_length=1, strict=False, description="What the clips show.")
    num_inference_steps: int = Field(20, ge=1, description="Steps of the model's own sampler.")
    guidance_scale: float = Field(5.0, ge=0, description="Guidance; 1 or less is none.")
    fps: float = Field(16.0, gt=0, description="Frames per second of the files.")
    seed: int = Field(0, ge=0, description="Of the first noise.")


class Export(Section):
    """The result: a diffusers folder."""

    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Precision of the weights but `proj_l`, which stays float32."
    )
    average: bool = Field(True, description="Ship the moving average, if one is kept.")


class Blocks(Section):
    """Which tokens attention keeps; see `turbo-opt passes show sparse-attention`."""

    topk: Share = Field(0.1, description="Share of the key blocks that a query block keeps.")
    block_q: Literal[64, 128] = Field(128, description="Tokens per query block; 64 on Hopper.")
    block_k: Literal[64, 128] = Field(64, description="Tokens per key block; 128 on Hopper.")
    feature_map: Literal["softmax", "elu", "relu"] = Field(
        "softmax", description="Feature map of the linear branch."
    )


class SparseLinear(Blocks):
    """The attention that the student is tuned for."""

    mode: Literal["sla", "sla2"] = Field(
        "sla",
        description="sla: blocks by their means, the linear branch projected by `proj_l`. sla2: "
        "blocks by the router of `student.start`, which stays as it is, and a learned ratio.",
    )
    quantized: bool = Field(
        False,
        description="The sparse branch gives what 8-bit operands give, as the compiled model will; "
        "gradients stay those of 16 bits.",
    )
    trained: Literal["all", "proj_l"] = Field(
        "all", description="All weights of the student, or only the branch's projection."
    )

    @model_validator(mode="after")
    def _has_what_is_trained(self) -> SparseLinear:
        if self.mode == "sla2" and self.trained == "proj_l":
            raise ValueError("mode 'sla2' has no proj_l to train: set trained to 'all'")
        return self


class ClosedForm(Section):
    """Ridge regression of `proj_l`, without training."""

    clips: int = Field(16, ge=1, description="Samples whose q, k and v are looked at.")
    noise_levels: int = Field(4, ge=1, description="Noise levels at which each is looked at.")
    ridge: float = Field(
        1e-2, ge=0, description="Regularization, as a share of the mean eigenvalue."
    )


class Student(Section):
    """Where the student's weights begin."""

    start: str | None = Field(
        None,
        description="A `model` folder of an earlier job or of the closed form, or weights for the "
        "teacher's architecture in any layout that recipes take (`convert` writes some); relative "
        "to this file. null begins with the teacher's weights and a zero `proj_l`. sla.mode sla2 "
        "needs one of `turbo-opt calibrate router`.",
    )


class Companion(Section):
    """A dense model of the teacher's architecture that the tuning's difference shall fit too."""

    source: str = Field(
        min_length=1,
        description="A diffusers folder, such as the `model` of a job that distilled, or weights "
        "for the teacher's architecture in any layout that recipes take; relative to this file, or "
        "a hub id.",
    )
    noise: Noise = Field(
        default_factory=Noise,
        description="Noise levels that it is trained at; a student of four steps has low: 0.55.",
    )


class Job(Section):
    """What every training job says."""

    schema_version: Literal[1] = Field(description="Version of this format: 1.")
    description: str = Field("", description="One sentence.")
    teacher: Teacher = Field(default_factory=Teacher, description="The model that is imitated.")
    data: Data = Field(description="What is learned from.")
    noise: Noise = Field(default_factory=Noise, description="Noise levels that are trained.")
    training: Training = Field(default_factory=Training, description="The training loop.")
    save: Saving = Field(default_factory=Saving, description="Checkpoints.")
    log: Logging = Field(default_factory=Logging, description="Logs.")
    samples: Samples | None = Field(None, description="Clips during training; null makes none.")
    export: Export = Field(default_factory=Export, description="The result.")

    _folder: Path = PrivateAttr(default_factory=Path)

    def located(self, folder: Path) -> Self:
        """This job, knowing the folder that its relative paths start from."""
        copy = self.model_copy()
        copy._folder = folder
        return copy

    def path(self, text: str) -> Path:
        """A path written in the job."""
        return self._folder / Path(text).expanduser()

    @property
    def folder(self) -> Path:
        """What relative paths start from."""
        return self._folder

    def canonical(self) -> dict[str, Any]:
        """All fields, defaults filled in, as JSON data."""
        return self.model_dump(mode="json")


class SLAJob(Job):
    """A job of `turbo-opt calibrate sla`."""

    job: Literal["sla"] = Field(description="`sla`: tuning for sparse-linear attention.")
    student: Student = Field(default_factory=Student, description="The model that is trained.")
    sla: SparseLinear = Field(default_factory=SparseLinear, description="Its self-attention.")
    companions: tuple[Companion, ...] = Field(
        (),
        strict=False,
        description="Models that `merge-weights` will add the tuning's difference to: each takes "
        "its turn with the teacher, step by step.",
    )
    closed_form: ClosedForm = Field(
        default_factory=ClosedForm, description="Settings of --closed-form."
    )
