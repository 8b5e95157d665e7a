"""The ledger: what is kept comes back as it was, under exactly the content that it came of; damage is seen and done again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transplant_ray.errors import RunError
from transplant_ray.evaluate import ledger as module
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.evaluate.harness_process import JudgeSpec
from transplant_ray.evaluate.ledger import Ledger, asked, page_key
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.storage import Shelf

EXAMPLES = tuple(Rendered(f"e{i}", (1, i + 5), (2,), f"a{i}") for i in range(6))
RULES = Rules(GenerationSettings(4, (2,), ("\n",), 8), "exact")


def outcome(variant: str, example: Rendered, **changes: object) -> Outcome:
    return replace(Outcome(variant, example.id, f"{variant} says", False, 3, True), **changes)  # type: ignore[arg-type]


def shard(variant: str, examples: tuple[Rendered, ...] = EXAMPLES) -> VariantShard:
    return VariantShard(variant, tuple(outcome(variant, example) for example in examples), 1.5)


def opened(folder: Path, notes: list[str] | None = None) -> Ledger:
    return Ledger(Shelf(str(folder)), (notes if notes is not None else []).append)


def page(**changes: object) -> str | None:
    return page_key(("source", "target"), "float32", replace(RULES, **changes))  # type: ignore[arg-type]


TEXT = st.text(max_size=20)
OUTCOMES = st.builds(
    Outcome,
    st.sampled_from(["a", "b"]), st.sampled_from([e.id for e in EXAMPLES]), TEXT, st.booleans(), st.integers(0, 2**31 - 1),
    st.booleans(), st.integers(0, 9), st.booleans(), st.none() | TEXT, st.none() | st.floats(0, 1e9),
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.lists(OUTCOMES, max_size=8, unique_by=lambda each: (each.variant, each.example)))
def test_what_is_kept_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, kept: list[Outcome]) -> None:
    folder, key = tmp_path_factory.mktemp("ledger"), page()
    first = opened(folder)
    for each in kept:
        first.keep(key, VariantShard(each.variant, (each,), 0.5), EXAMPLES)
    first.write()
    for ledger in (first, opened(folder)):
        for variant in ("a", "b"):
            mine = {each.example: each for each in kept if each.variant == variant}
            found = ledger.recall(key, variant, EXAMPLES)
            assert found.outcomes == tuple(mine[example.id] for example in EXAMPLES if example.id in mine)
            assert found.seconds == 0.5 * len(mine)


def test_an_outcome_is_written_once(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for _ in range(3):
        ledger.keep(page(), shard("a"), EXAMPLES)
        ledger.write()
    assert len(list(tmp_path.rglob("*.parquet"))) == 1


def test_another_id_of_the_same_example_is_the_same_question(tmp_path: Path) -> None:
    """Ids are of texts, and the ledger is by tokens: what is asked decides."""
    ledger = opened(tmp_path)
    ledger.keep(page(), shard("a"), EXAMPLES)
    renamed = replace(EXAMPLES[0], id="another")
    assert ledger.recall(page(), "a", [renamed]).outcomes[0].example == "another"


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.keep(page(), replace(shard("a"), error="it died"), EXAMPLES)
    assert ledger.recall(page(), "a", EXAMPLES).outcomes == ()


# Nothing is stale.


@pytest.mark.parametrize(
    "other",
    [
        page_key(("source", "mended"), "float32", RULES),
        page_key(("target", "source"), "float32", RULES),
        page_key(("source", "target"), "bfloat16", RULES),
        page(scorer="number"),
        page(generation=GenerationSettings(5, (2,), ("\n",), 8)),
        page(generation=GenerationSettings(4, (2, 3), ("\n",), 8)),
        page(generation=GenerationSettings(4, (2,), (), 8)),
    ],
)
def test_another_way_of_asking_is_another_page(tmp_path: Path, other: str | None) -> None:
    ledger = opened(tmp_path)
    ledger.keep(page(), shard("a"), EXAMPLES)
    ledger.write()
    assert other != page()
    assert opened(tmp_path).recall(other, "a", EXAMPLES).outcomes == ()


def test_how_many_rows_share_a_batch_is_no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert page(generation=GenerationSettings(4, (2,), ("\n",), 64)) == page()
    known = page()
    monkeypatch.setattr(module, "_versions", lambda: ["another torch"])
    assert page() != known


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": (1, 9, 9)},
        {"answer_ids": (3,)},
        {"answer": "b"},
        {"choices": (EXAMPLES[1], EXAMPLES[2])},
        {"doc": {"question": "?"}},
    ],
)
def test_another_question_is_not_answered_from_the_ledger(tmp_path: Path, change: dict[str, object]) -> None:
    ledger = opened(tmp_path)
    ledger.keep(page(), shard("a"), EXAMPLES)
    changed = replace(EXAMPLES[0], id="changed", **change)  # type: ignore[arg-type]
    assert asked(changed) != asked(EXAMPLES[0])
    assert ledger.recall(page(), "a", [changed]).outcomes == ()


def test_a_task_of_the_harness_has_a_page_where_its_file_comes_with_the_library() -> None:
    def judged(path: str, metric: str = "acc") -> str | None:
        return page(scorer=JudgeSpec(path, metric, "none", (), 0, 0).scorer)

    assert judged("/home/me/task.yaml") is None, "it may say other things tomorrow"
    pages = {judged("arc/arc_easy.yaml"), judged("arc/arc_challenge.yaml"), judged("arc/arc_easy.yaml", "acc_norm")}
    assert len(pages - {None}) == 3


# Damage.


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return content[:40] + bytes([content[40] ^ 1]) + content[41:]


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b"", lambda _: b"PAR1 nonsense"])
def test_a_damaged_part_is_said_set_aside_and_done_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    ledger = opened(tmp_path)
    for variant in ("a", "b"):
        ledger.keep(page(), shard(variant), EXAMPLES)
        ledger.write()
    first, second = sorted(tmp_path.rglob("*.parquet"))
    first.write_bytes(damage(first.read_bytes()))
    notes: list[str] = []
    again = opened(tmp_path, notes)
    found = {variant: len(again.recall(page(), variant, EXAMPLES).outcomes) for variant in ("a", "b")}
    assert sorted(found.values()) == [0, len(EXAMPLES)]
    assert len(notes) == 1
    assert first.name in notes[0]
    assert sorted(tmp_path.rglob("*.parquet*")) == sorted([first.with_name(f"{first.name}.damaged"), second])
    lost = min(found, key=lambda variant: found[variant])
    again.keep(page(), shard(lost), EXAMPLES)
    again.write()
    assert [len(opened(tmp_path).recall(page(), variant, EXAMPLES).outcomes) for variant in ("a", "b")] == [len(EXAMPLES)] * 2


def test_a_part_that_was_being_written_is_not_there(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.keep(page(), shard("a"), EXAMPLES)
    ledger.write()
    (part,) = tmp_path.rglob("*.parquet")
    part.rename(part.with_name(f".{part.name}.1.part"))
    notes: list[str] = []
    assert opened(tmp_path, notes).recall(page(), "a", EXAMPLES).outcomes == ()
    assert not notes


def test_a_ledger_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("a file")
    ledger = opened(tmp_path / "ledger")
    ledger.unwritten["page"].append({"variant": "a"})
    with pytest.raises(RunError, match="ledger"):
        ledger.write()


def test_a_shelf_at_an_address_is_one_in_a_folder(tmp_path: Path) -> None:
    for shelf in (Shelf(str(tmp_path / "here")), Shelf(f"file://{tmp_path}/there")):
        assert shelf.names("page") == []
        shelf.write("page/x.parquet", b"content")
        assert shelf.names("page") == ["page/x.parquet"]
        assert shelf.read("page/x.parquet") == b"content"
        shelf.set_aside("page/x.parquet")
        assert shelf.names("page") == []
