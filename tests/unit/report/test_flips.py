"""Flips: which they are, and how their texts are shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from transplant_ray.report.flips import find_flips, shown, visible
from transplant_ray.report.records import Answer, Asked

RIGHTS = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.booleans(), max_size=12)


@given(RIGHTS, RIGHTS)
def test_flips_are_what_one_got_right_and_the_other_wrong(target: dict[str, bool], winner: dict[str, bool]) -> None:
    answers = [
        Answer(variant=v, example=e, completion=f"{v} {e}", correct=c)
        for v, r in (("t", target), ("w", winner))
        for e, c in r.items()
    ]
    found = find_flips("test", answers, "t", "w", [Asked(example="a", prompt="p", answer="r")])
    both = [example for example in target if example in winner]
    if not both:
        assert found is None
        return
    assert found is not None
    assert found.n == len(both)
    assert [flip.example for flip in found.gained] == [e for e in both if winner[e] and not target[e]]
    assert [flip.example for flip in found.lost] == [e for e in both if target[e] and not winner[e]]
    for flip in (*found.gained, *found.lost):
        assert (flip.before, flip.after) == (f"t {flip.example}", f"w {flip.example}")
        assert (flip.prompt, flip.answer) == (("p", "r") if flip.example == "a" else (None, None))


@given(st.text("abc", max_size=500), st.integers(10, 200))
def test_a_long_text_keeps_both_ends_and_says_how_much_is_left_out(text: str, most: int) -> None:
    if len(text) <= most:
        assert shown(text, most) == text
        return
    head, _, rest = shown(text, most).partition(" […")
    number, _, tail = rest.partition(" characters left out…] ")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert len(head) + len(tail) == most
    assert int(number.replace(",", "")) == len(text) - most


def test_nothing_hides() -> None:
    assert visible("a\x00b\x1b[31m\r\x7f") == "a␀b␛[31m␍␡"
    assert visible("admin‮txt.exe⁦") == "admin⟨U+202E⟩txt.exe⟨U+2066⟩"
    assert visible("two\nlines\tand a tab, é, 漢字") == "two\nlines\tand a tab, é, 漢字"
