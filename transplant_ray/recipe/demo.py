"""How large the organ demo is: its text, its model, its trainings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from transplant_ray.recipe.part import Part

DemoFamily = Literal["gpt2", "llama"]


class DemoSpec(Part):
    """Everything that decides what a demo gives; all sizes were chosen from the time that they take, before any result was seen."""

    family: DemoFamily = "gpt2"
    seed: int = Field(0, ge=0)
    """Of the model's first weights, of the order in which all trainings read, and of the stand-in's problems."""
    characters: int = Field(6_000_000, ge=20_000)
    """Of general text."""
    problems: int = Field(7_473, ge=100)
    """Of the stand-in, where GSM8K is not there; GSM8K's own number by default."""
    vocabulary: int = Field(2_048, ge=260)
    """Tokens: 256 bytes, an end, and what byte-pair encoding finds."""
    layers: int = Field(8, ge=2)
    width: int = Field(64, ge=8)
    heads: int = Field(4, ge=1)
    context: int = Field(128, ge=8)
    batch: int = Field(8, ge=1)
    """Contexts a step, in all trainings."""
    tokens: int = Field(3_000_000, ge=1)
    """Of general text that the model is trained on."""
    lr: float = Field(3e-3, gt=0)
    """Of the model; the organ's is `organ_lr`."""
    organ_tokens: int = Field(100_000, ge=1)
    """Of domain text that the organ is trained on, and every method that it is compared with."""
    organ_lr: float = Field(1e-3, gt=0)
    contexts: int = Field(64, ge=2)
    """That perplexity is measured on, of each half of each text."""

    @model_validator(mode="after")
    def _heads_fit(self) -> DemoSpec:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"`width` {self.width} is to be an even number of times `heads` {self.heads}")
        return self
