"""The ledger: what is kept comes back as it was, under exactly the content that it came of; damage is seen and done again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transplant_ray.errors import RunError
from transplant_ray.evaluate import ledger as module
from transplant_ray.evaluate import parts
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.evaluate.harness_process import JudgeSpec
from transplant_ray.evaluate.ledger import Ledger, asked, page_key
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.shelf import Shelf
from transplant_ray.versions import CODE

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


@pytest.mark.parametrize(
    ("error", "kept"),
    [("no answer within 5 s", False), ("no match within 0.5 s", False), ("math-verify crashed", True), ("ValueError", True)],
)
def test_what_was_not_judged_in_time_is_tried_again(tmp_path: Path, error: str, kept: bool) -> None:
    ledger, unjudged = opened(tmp_path), outcome("a", EXAMPLES[0], error=error)
    ledger.keep(page(), VariantShard("a", (unjudged, outcome("a", EXAMPLES[1])), 1.0), EXAMPLES)
    ledger.write()
    for known in (ledger, opened(tmp_path)):
        assert [o.example for o in known.recall(page(), "a", EXAMPLES).outcomes] == (["e0"] if kept else []) + ["e1"]


def test_what_comes_in_a_burst_is_written_though_nothing_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = opened(tmp_path)
    ledger.keep(page(), shard("a"), EXAMPLES)
    ledger.write_if_due()
    assert not list(tmp_path.rglob("*.parquet")), "it is not long ago that the last part was written"
    monkeypatch.setattr(module, "PART_SECONDS", -1.0)
    for _ in range(3):
        ledger.write_if_due()
    assert len(list(tmp_path.rglob("*.parquet"))) == 1


# Nothing is stale.


def test_the_same_id_with_more_shots_is_another_question(tmp_path: Path) -> None:
    """Two tasks of one run may have the same rows, limits and scorer, and ask with another number of shots."""
    ledger = opened(tmp_path)
    with_shots = replace(EXAMPLES[0], prompt_ids=(7, 7, *EXAMPLES[0].prompt_ids))
    ledger.keep(page(), shard("a"), EXAMPLES)
    assert ledger.recall(page(), "a", [with_shots]).outcomes == ()
    ledger.keep(page(), VariantShard("a", (outcome("a", with_shots, completion="after shots"),), 1.0), [with_shots])
    ledger.write()
    for known in (ledger, opened(tmp_path)):
        said = [known.recall(page(), "a", [each]).outcomes[0].completion for each in (EXAMPLES[0], with_shots)]
        assert said == ["a says", "after shots"]


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


def key_of(monkeypatch: pytest.MonkeyPatch, **told: str) -> str | None:
    """A page's name where our code and the libraries are these."""
    monkeypatch.setattr(module, "versions", lambda names: {name: told.get(name, "1") for name in names})
    module._versions.cache_clear()
    try:
        return page()
    finally:
        module._versions.cache_clear()


def test_other_code_is_another_page_and_another_build_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    known = key_of(monkeypatch, torch="2.13.0")
    assert key_of(monkeypatch, torch="2.13.0+cpu") == known
    assert key_of(monkeypatch, torch="2.13.0", **{"transplant-ray": "not installed"}) == known
    others = {
        key_of(monkeypatch, torch="2.13.0", **{CODE: "abd"}),
        key_of(monkeypatch, torch="2.13.1"),
        key_of(monkeypatch, transformers="2"),
        key_of(monkeypatch, torch="2.13.0", tokenizers="2"),
    }
    assert len(others - {known}) == 4


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


# Many parts.

NUM_PARTS = parts.MANY + 6


@pytest.fixture
def many(tmp_path: Path) -> dict[str, VariantShard]:
    """A page in many parts; what it knows, by variant."""
    ledger = opened(tmp_path)
    for n in range(NUM_PARTS):
        ledger.keep(page(), shard(f"v{n}"), EXAMPLES)
        ledger.write()
    assert len(list(tmp_path.rglob("*.parquet"))) == NUM_PARTS
    return known(ledger)


def known(ledger: Ledger) -> dict[str, VariantShard]:
    return {f"v{n}": ledger.recall(page(), f"v{n}", EXAMPLES) for n in range(NUM_PARTS)}


def rows_on_disk(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in folder.rglob("*.parquet"))


def test_many_parts_become_one_of_the_same_rows(tmp_path: Path, many: dict[str, VariantShard]) -> None:
    assert known(opened(tmp_path)) == many
    (merged,) = tmp_path.rglob("*.parquet")
    assert merged.stem == hashlib.sha256(merged.read_bytes()).hexdigest()
    assert pq.read_metadata(merged).num_rows == NUM_PARTS * len(EXAMPLES)
    stamp = merged.stat().st_mtime_ns
    notes: list[str] = []
    again = opened(tmp_path, notes)
    assert known(again) == many
    again.keep(page(), shard("more"), EXAMPLES)
    again.write()
    assert len(opened(tmp_path).recall(page(), "more", EXAMPLES).outcomes) == len(EXAMPLES)
    assert merged.stat().st_mtime_ns == stamp
    assert len(list(tmp_path.rglob("*.parquet"))) == 2
    assert not notes


def test_a_few_parts_stay(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for n in range(3):
        ledger.keep(page(), shard(f"v{n}"), EXAMPLES)
        ledger.write()
    opened(tmp_path).recall(page(), "v0", EXAMPLES)
    assert len(list(tmp_path.rglob("*.parquet"))) == 3


@pytest.mark.parametrize("removed", [0, 1, 40])
def test_a_death_between_writing_the_merged_part_and_removing_the_others(
    tmp_path: Path, many: dict[str, VariantShard], monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    left = iter(range(removed))
    discard = Shelf.discard

    def discard_or_die(shelf: Shelf, name: str) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        discard(shelf, name)

    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "discard", discard_or_die)
        with pytest.raises(KeyboardInterrupt):
            known(opened(tmp_path))
    assert len(list(tmp_path.rglob("*.parquet"))) == NUM_PARTS + 1 - removed
    assert known(opened(tmp_path)) == many
    assert known(opened(tmp_path)) == many
    if removed < NUM_PARTS - parts.MANY:
        assert rows_on_disk(tmp_path) == NUM_PARTS * len(EXAMPLES), "what was there twice is there once"


def test_a_damaged_part_among_many_is_found_and_the_others_are_merged(tmp_path: Path, many: dict[str, VariantShard]) -> None:
    spoilt = sorted(tmp_path.rglob("*.parquet"))[NUM_PARTS // 2]
    spoilt.write_bytes(cut(spoilt.read_bytes()))
    notes: list[str] = []
    found = known(opened(tmp_path, notes))
    assert [spoilt.name in note for note in notes] == [True]
    (lost,) = [variant for variant, told in found.items() if not told.outcomes]
    assert found == many | {lost: found[lost]}
    assert len(list(tmp_path.rglob("*.parquet"))) == 1
    assert spoilt.with_name(f"{spoilt.name}.damaged").exists()


def test_another_driver_merges_what_is_about_to_be_read(
    tmp_path: Path, many: dict[str, VariantShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the names and the reading of the parts, they are gone."""
    others = iter([opened(tmp_path)])
    names = Shelf.names

    def look(shelf: Shelf, under: str) -> list[str]:
        found = names(shelf, under)
        if other := next(others, None):
            assert known(other) == many
        return found

    monkeypatch.setattr(Shelf, "names", look)
    notes: list[str] = []
    assert known(opened(tmp_path, notes)) == many
    assert not notes
    assert len(list(tmp_path.rglob("*.parquet"))) == 1


def test_two_drivers_merge_at_once(tmp_path: Path, many: dict[str, VariantShard]) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: known(opened(tmp_path)), range(4))) == [many] * 4
    assert known(opened(tmp_path)) == many


def test_no_room_for_the_merged_part_is_said_and_nothing_is_lost(
    tmp_path: Path, many: dict[str, VariantShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RunError("no room")

    monkeypatch.setattr(Shelf, "write", full)
    notes: list[str] = []
    assert known(opened(tmp_path, notes)) == many
    assert [f"{NUM_PARTS} parts" in note and "no room" in note for note in notes] == [True]
    assert len(list(tmp_path.rglob("*.parquet"))) == NUM_PARTS


def test_parts_are_read_side_by_side(tmp_path: Path, many: dict[str, VariantShard], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two waits for the other: one after another would wait for ever."""
    both, read = Barrier(2), Shelf.read_present

    def wait_and_read(shelf: Shelf, name: str) -> bytes | None:
        both.wait(60)
        return read(shelf, name)

    monkeypatch.setattr(Shelf, "read_present", wait_and_read)
    assert known(opened(tmp_path)) == many


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
