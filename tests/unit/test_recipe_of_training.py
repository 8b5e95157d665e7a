"""How an organ is trained: settings from the command line, and what is refused of them."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transplant_ray.errors import RecipeError
from transplant_ray.recipe import HubData, TrainingSpec, parse_training


def test_settings_are_read_as_those_of_recipes_are() -> None:
    hub = "hub:openai/gsm8k?name=main&split=train&revision=abc"
    spec = parse_training(["a.jsonl", hub], ["lr=1e-3", "steps=7", "betas=[0.8, 0.9]"])
    assert spec.data == ("a.jsonl", HubData(path="openai/gsm8k", name="main", split="train", revision="abc"))
    assert (spec.lr, spec.steps, spec.betas) == (1e-3, 7, (0.8, 0.9))
    assert parse_training(["hub:x/y"]).data == (HubData(path="x/y", split="train"),)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["lr=0"], "`lr` is 0: Input should be greater than 0"),
        (["lrr=1"], "`lrr` is not a key of a training. Did you mean `lr`"),
        (["zzz=1"], "`zzz` is not a key of a training. It has data, text, share, context, steps"),
        (["steps=5", "tokens=5"], "`steps` and `tokens` both say how long"),
        (["micro_batch=3"], "`batch` 8 is no multiple of `micro_batch` 3"),
        (["betas=[0.9, 1]"], "expected two numbers from 0 to below 1"),
        (["dtype=int8"], "`dtype`"),
        (["steps=yes"], "true and false are not expected here"),
        (["steps"], "expected key=value"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=r"^(training: |override )") as refused:
        parse_training(["a.txt"], settings)
    assert words in str(refused.value)


def test_without_data_there_is_no_training() -> None:
    with pytest.raises(RecipeError, match="`data`"):
        parse_training([])
    with pytest.raises(RecipeError, match="`data"):
        parse_training(["hub:x/y?spilt=train"])


@given(tokens=st.integers(1, 10**9), batch=st.integers(1, 64), context=st.integers(2, 4096))
def test_tokens_are_at_least_those_that_were_asked_for(tokens: int, batch: int, context: int) -> None:
    spec = TrainingSpec(data=("x",), tokens=tokens, batch=batch, context=context)
    assert spec.num_steps == ceil(tokens / (batch * context))
    assert tokens <= spec.num_tokens < tokens + batch * context
    assert 1 <= spec.pause <= spec.num_steps
