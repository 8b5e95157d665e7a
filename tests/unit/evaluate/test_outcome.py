"""Outcomes: what a model answered, scored, counted shard by shard."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny import EOS, tiny_model, tiny_tokenizer

from transplant_ray.evaluate import scorers
from transplant_ray.evaluate.answers import Answers, VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import Completion, GenerationSettings, generate
from transplant_ray.evaluate.outcome import Outcome, Tally, answer_examples, score
from transplant_ray.evaluate.results import OUTCOME_SCHEMA
from transplant_ray.evaluate.scorers import exact
from transplant_ray.tables import read_rows, write_rows


def outcomes(variant: str, *right: bool) -> tuple[Outcome, ...]:
    return tuple(Outcome(variant, f"e{i}", f"{variant} said {i}", correct, 3, True) for i, correct in enumerate(right))


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("15", "15", True),
        (" 15\n", "15", True),
        ("15", "\t15 ", True),
        ("15.", "15", False),
        ("1 5", "15", False),
        ("YES", "yes", False),
        ("", "15", False),
        ("15 15", "15", False),
    ],
)
def test_exact_is_equal_text_but_for_white_space_at_the_ends(completion: str, answer: str, right: bool) -> None:
    assert exact(completion, answer).correct is right


def test_examples_are_answered_in_order_and_scored() -> None:
    model, tokenizer = tiny_model("phi3", 1), tiny_tokenizer()
    tokenizer.padding_side = "left"
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in ("what is 4+15=", "1", "a: b?")]
    settings = GenerationSettings(5, (EOS,), batch_size=2)
    completions = generate(model, tokenizer, prompts, settings)
    answers = (f" {completions[0].text}", "something else", completions[2].text)
    examples = [Rendered(f"e{i}", prompt, (EOS,), answer) for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))]
    found = answer_examples("v", model, tokenizer, examples, settings, "exact")
    assert [outcome.correct for outcome in found] == [True, False, True]
    for outcome, example, completion in zip(found, examples, completions, strict=True):
        told = (outcome.variant, outcome.example, outcome.completion, outcome.num_tokens, outcome.finished)
        assert told == ("v", example.id, completion.text, len(completion.token_ids), completion.finished)


@pytest.mark.parametrize(
    ("said", "right", "parsed"), [(r"\boxed{4}", True, True), (r"\boxed{5}", False, True), ("4", False, False)]
)
def test_an_outcome_tells_a_wrong_answer_from_none(said: str, right: bool, parsed: bool) -> None:
    example = Rendered("e", (1,), (EOS,), r"\boxed{4}")
    found = score("v", example, Completion((7, EOS), said, True, 1), "strict_boxed")
    assert found == Outcome("v", "e", said, right, 2, True, 1, parsed)


def test_outcomes_survive_their_table(tmp_path: Path) -> None:
    rows = outcomes("v", True, False)
    write_rows(tmp_path / "test.parquet", [asdict(row) for row in rows], OUTCOME_SCHEMA)
    assert tuple(Outcome(**row) for row in read_rows(tmp_path / "test.parquet")) == rows


def test_a_tally_counts() -> None:
    tally = Tally.of(outcomes("v", True, False, True, True), 2.5)
    assert tally == Tally(4, 3, 2.5, parsed=4)
    assert tally.accuracy == 0.75


def test_a_tally_counts_what_was_not_read_and_what_the_limit_cut() -> None:
    cut, unread = (replace(outcomes("v", False)[0], **change) for change in ({"finished": False}, {"parsed": False}))
    tally = Tally.of([*outcomes("v", True), cut, unread], 1.0)
    assert (tally.n, tally.parsed, tally.cut_off) == (3, 2, 1)


def test_shards_add_up_by_split_and_variant() -> None:
    answers = Answers()
    answers.add("select", VariantShard("v", outcomes("v", True, False), 1.0))
    answers.add("select", VariantShard("w", outcomes("w", False), 4.0))
    answers.add("select", VariantShard("v", outcomes("v", True), 2.0))
    answers.add("test", VariantShard("v", outcomes("v", False), 8.0))
    assert answers.tallies == {
        "select": {"v": Tally(3, 2, 3.0, parsed=3), "w": Tally(1, 0, 4.0, parsed=1)},
        "test": {"v": Tally(1, 0, 8.0, parsed=1)},
    }
    assert answers.baseline("select", "w", {"e0"}) == Tally(1, 0, 4.0, parsed=1)
    assert answers.completions("select", "w") == {"e0": "w said 0"}
    assert len(list(answers.outcomes("select"))) == 4


def test_the_first_error_stays_and_a_failed_variant_is_no_baseline() -> None:
    answers = Answers()
    for error in (None, "first", None, "second"):
        answers.add("select", VariantShard("v", () if error else outcomes("v", True), 1.0, error))
    assert answers.tallies["select"]["v"] == Tally(2, 2, 4.0, "first", parsed=2)
    assert answers.baseline("select", "v", {"e0"}) is None
    assert answers.baseline("select", "never evaluated", {"e0"}) is None
    assert answers.baseline("test", "v", {"e0"}) is None


def test_a_baseline_is_counted_on_the_examples_that_are_asked_for() -> None:
    answers = Answers()
    answers.add("select", VariantShard("v", outcomes("v", True, False, True), 1.0))
    assert answers.baseline("select", "v", {"e0", "e1"}) == Tally(2, 1, 1.0, parsed=2)
    assert answers.baseline("select", "v", {"e0", "e9"}) is None


def test_an_answer_that_could_not_be_judged_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "MATCH_LIMIT", 0.2)
    example = Rendered("e", (1,), (EOS,), "a")
    found = score("v", example, Completion((7, EOS), "a" * 200 + "b", True), "regex:((?:a|aa)+)$")
    assert found == Outcome("v", "e", "a" * 200 + "b", False, 2, True, 0, False, "no match within 0.2 s")
    write_rows(tmp_path / "test.parquet", [asdict(found)], OUTCOME_SCHEMA)
    assert [Outcome(**row) for row in read_rows(tmp_path / "test.parquet")] == [found]
