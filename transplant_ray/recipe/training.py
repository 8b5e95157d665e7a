"""How an organ is trained, and by how many."""

from __future__ import annotations

from math import ceil
from typing import Literal

from pydantic import Field, field_validator, model_validator

from transplant_ray.recipe.corpus import CorpusSpec
from transplant_ray.recipe.part import Part

DEFAULT_STEPS = 1000


class BudgetSpec(CorpusSpec):
    """What is trained on, how long, and how: all of a training but its learning rate and its seed."""

    context: int = Field(512, ge=2)
    """Tokens that are read at a time."""
    steps: int | None = Field(None, ge=1)
    """Of the optimizer."""
    tokens: int | None = Field(None, ge=1)
    """Instead of `steps`: at least so many are read."""
    batch: int = Field(8, ge=1)
    """Contexts a step, over all workers."""
    micro_batch: int | None = Field(None, ge=1)
    """Contexts that a worker reads at a time; all of its share of the batch by default."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    floor: float = Field(0.1, ge=0, le=1)
    """Share of the learning rate that is left at the end."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    """Of AdamW; biases and norms are spared."""
    clip: float = Field(1.0, gt=0)
    """The largest norm of a step's gradient."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in: by default bfloat16 on GPUs and float32 on CPU. Weights and their optimizer are float32."""
    held_out: float = Field(0.02, ge=0, lt=1)
    """Share of the documents, by the hash of what they say, that is not trained on but gives a curve of its own."""
    held_out_contexts: int = Field(64, ge=1)
    """At most so many are read for a point of that curve."""
    report_every: int = Field(10, ge=1)
    """Steps between two points of the loss."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between two checkpoints, each with a point of the held-out loss; a tenth of all by default."""

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("expected two numbers from 0 to below 1")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> BudgetSpec:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("`steps` and `tokens` both say how long; give one of them")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"`batch` {self.batch} is no multiple of `micro_batch` {self.micro_batch}")
        return self

    @property
    def num_steps(self) -> int:
        if self.tokens is not None:
            return ceil(self.tokens / (self.batch * self.context))
        return self.steps or DEFAULT_STEPS

    @property
    def num_tokens(self) -> int:
        """That are read in all of them."""
        return self.num_steps * self.batch * self.context

    @property
    def pause(self) -> int:
        """Steps between two checkpoints."""
        return self.checkpoint_every or max(1, ceil(self.num_steps / 10))


class TrainingSpec(BudgetSpec):
    """What decides the weights of a trained organ; how many workers there are only moves the last bits of sums."""

    lr: float = Field(3e-4, gt=0)
    """The highest learning rate: it rises to it over `warmup`, and then falls as a cosine to `floor` of it."""
    seed: int = Field(0, ge=0)


class WorkerSpec(Part):
    """Who trains: processes of Ray Train, each with a copy of the organ, that share the batch."""

    address: str | None = None
    """Address of a Ray cluster; without one Ray starts in this process (or `RAY_ADDRESS` is joined)."""
    num: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0, le=1)
    """Of each worker."""
    cpus: int | None = Field(None, ge=1)
    """Of each worker: its threads. By default those of the cluster are shared out; 1 where workers have GPUs."""
    max_failures: int = Field(3, ge=0)
    """Deaths of workers after which training is given up; until then it goes on from the last checkpoint."""
