"""The page: what it says of runs of any kind, and that nothing in a run becomes part of it as markup."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page, flat
from runs import Made, Row, write_run

from transplant_ray.errors import RunError
from transplant_ray.evaluate.verdict import Conclusion
from transplant_ray.report import page as page_module
from transplant_ray.report.build import build_report
from transplant_ray.report.flips import visible
from transplant_ray.report.words import MEANINGS
from transplant_ray.storage import RunFolder

SMALL = Made(rankers=("lae",), kinds=("all",), ks=(1, 4), penalties=(), num_layers=2, num_examples=12)
CHARACTERS = "<>&\"'/=`!-[]{}%#$\\ \x00\x1b\u202eabimgscriptonerror"
CLASSICS = (
    "<script>alert(1)</script>", "</td></table><h1>x", "<!--", "{{ 7 * 7 }}", "<img src=x onerror=alert(1)>", "</title></style><b>",
    "&lt;b&gt;", "]]>", "<plaintext>", "</svg><script>",
)  # fmt: skip
MARKUP = st.text(alphabet=st.sampled_from(CHARACTERS), min_size=1, max_size=60) | st.sampled_from(CLASSICS)
PLOTS = {"headline_plot": None, "curve_plots": [], "score_plots": [], "cost_plots": [], "changed_plot": None}


def build(path: Path, made: Made = SMALL, **changed: Any) -> Page:
    """The page of a made run; `changed` goes over its summary."""
    folder = write_run(path, made)
    if changed:
        told = json.loads(folder.summary.read_text())
        folder.summary.write_text(json.dumps({**told, **changed}))
    return Page.of(build_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two hundred variants, long completions."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "large", Made(texts=("a long completion\n" * 400, "short")))
    build_report(folder)
    return folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and have tests of their own."""
    leave_out_figures(monkeypatch)


def leave_out_figures(patch: pytest.MonkeyPatch) -> None:
    for name, nothing in PLOTS.items():
        patch.setattr(page_module, name, lambda _, nothing=nothing: nothing)


@settings(max_examples=25, deadline=None)
@given(said=MARKUP)
def test_markup_in_a_run_is_text_on_its_page(said: str) -> None:
    """In prompts, answers, completions, errors, labels, names, warnings, the verdict and the recipe: no element more, none less."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch)
        hostile, plain = hostile_page(said), harmless_page()
    assert Counter(hostile.tags) == Counter(plain.tags)
    assert [(tag, name) for tag, name, _ in hostile.attributes] == [(tag, name) for tag, name, _ in plain.attributes]
    assert hostile.text.count(flat(visible(said))) >= plain.text.count("harmless") > 50


@cache
def harmless_page() -> Page:
    return hostile_page("harmless")


def hostile_page(said: str) -> Page:
    def change(row: Row) -> Row:
        return {**row, "ranker": row["ranker"] and said, "kind": row["kind"] and said, "error": said if row["k"] == 1 else None}

    made = dataclasses.replace(SMALL, texts=(said,), change=change, guards=(said,))
    verdict = {"conclusion": said, "sentence": said, "guards": [], "arms": None}
    with tempfile.TemporaryDirectory() as folder:
        return build(
            Path(folder) / "run", made, name=said, warnings=[said], verdict=verdict, environment={said: said}, mlflow_run=said
        )


def test_a_large_run_is_a_small_page(large: RunFolder) -> None:
    assert len(large.report.read_text()) < 5_000_000
    assert Page.of(large.report.read_text()).text.count("characters left out…]") >= 20


def test_the_page_needs_nothing_from_outside(large: RunFolder) -> None:
    html = large.report.read_text(encoding="utf-8")
    page = Page.of(html)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "img"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "xlink:href", "srcset", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert not re.search(r"@import|url\((?!#)", html)


def test_every_name_on_the_page_is_there_once_and_every_reference_leads_somewhere(large: RunFolder) -> None:
    page = Page.of(large.report.read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert page.references
    assert page.references <= set(page.ids)


def test_every_figure_has_a_label_and_every_caption_its_n(large: RunFolder) -> None:
    html = large.report.read_text(encoding="utf-8")
    labels = [value for tag, name, value in Page.of(html).attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == len(set(labels)) == 1 + 3 + 3 + 2 * 4 + 2 + 1  # headline, K, ‖ΔW‖, two a ranker, costs, changed
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html, re.DOTALL)
    for caption in captions[:3]:
        assert "n = 300" in caption
        assert "95 % Wilson intervals" in caption
    assert all("split seed 42" in caption for caption in captions[1:3])


def as_losses(row: Row) -> Row:
    """The same run, of a task whose scorer is `loss`."""
    scored = {"loss": 1 - row["accuracy"], "score": row["accuracy"] - 1, "ci_low": 1 - row["ci_high"], "ci_high": 1 - row["ci_low"]}
    return {**row, **scored, **dict.fromkeys(("accuracy", "correct", "tir", "parsed", "cut_off"))}


def test_a_run_of_losses_speaks_of_losses(tmp_path: Path) -> None:
    page = build(tmp_path / "run", dataclasses.replace(SMALL, guards=(), change=as_losses))
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert any(label.startswith("Loss on test") for label in labels)
    assert "Gain, nats" in page.text
    assert "95 % Student intervals" in page.text
    assert "perplexity" in page.text
    assert not [word for word in ("Wilson", "McNemar", "TIR") if word in page.text]
    assert not any("ccuracy" in label for label in labels)


def test_every_variant_is_in_the_table(large: RunFolder) -> None:
    page = Page.of(large.report.read_text(encoding="utf-8"))
    lines = [value.split()[0] for tag, name, value in page.attributes if (tag, name) == ("tr", "class") and value.split()]
    roles = Counter(line for line in lines if line in ("target", "source", "all", "trial", "control"))
    assert roles == {"target": 2, "source": 2, "all": 2, "trial": 4 * 3 * 8 + 4 + 1, "control": 24 + 72 + 3}


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    first = build_report(folder).read_bytes()
    assert build_report(folder).read_bytes() == first
    assert [path.name for path in folder.path.glob("*.part")] == []


@pytest.mark.usefixtures("no_figures")
def test_the_first_thing_said_is_the_verdict(tmp_path: Path) -> None:
    page = build(tmp_path / "run", verdict={"conclusion": "worse than the target", "sentence": "it lost more."})
    before, after = page.text.split("Worse than the target", 2)[1:]
    assert "It lost more." in after[:40]
    assert "Winner, test" not in before
    assert "Winner, test" in after


@pytest.mark.parametrize("conclusion", get_args(Conclusion))
def test_every_conclusion_is_explained(conclusion: str) -> None:
    tone, meaning = MEANINGS[conclusion]
    assert tone in ("good", "caution", "bad", "flat")
    assert meaning.endswith(".")
    assert set(MEANINGS) == set(get_args(Conclusion))


@pytest.mark.usefixtures("no_figures")
def test_a_test_split_that_was_opened_again_is_said_first_and_in_the_method(tmp_path: Path) -> None:
    page = build(tmp_path / "again", test_opened=3)
    assert "This test split was opened 3 times so far" in page.text
    assert "test split opened3 times so far" in page.text
    once = build(tmp_path / "once", test_opened=1)
    assert "This test split was opened" not in once.text
    assert "test split openedonce so far, this run included" in once.text


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("unjudged", "told"),
    [
        ({"select": 0, "test": 0}, None),
        ({"select": 3, "test": 0}, "3 on select."),
        ({"select": 3, "test": 2}, "3 on select and 2 on test."),
    ],
)
def test_answers_that_could_not_be_judged_are_counted(tmp_path: Path, unjudged: dict[str, int], told: str | None) -> None:
    page, words = build(tmp_path / "run", unjudged=unjudged), "Answers that no scorer could judge count as wrong: "
    assert (words in page.text) is (told is not None)
    assert f"{words}{told or ''}" in page.text or told is None


@pytest.mark.usefixtures("no_figures")
def test_flips_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    page = build(tmp_path / "run", dataclasses.replace(SMALL, num_examples=90))
    gained = [i for i in range(90) if i % 3 == 0 and i % 10 != 1]
    lost = [i for i in range(90) if i % 3 != 0 and i % 10 == 1]
    assert f"n = 90: {len(gained)} gained, {len(lost)} lost" in page.text
    shown = [int(found) for found in re.findall(r"prompt of example (\d+):", page.text)]
    assert shown == gained[:20] + lost
    assert f"{len(gained) - 20} more, in the order of the data" in page.text


OLDER = dataclasses.replace(SMALL, newer=False, guards=())


def test_an_older_run_says_what_it_did_not_measure(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", OLDER)
    told = json.loads(folder.summary.read_text())
    folder.summary.write_text(json.dumps({key: told[key] for key in ("name", "winner", "baselines") if key in told}))
    page = Page.of(build_report(folder).read_text(encoding="utf-8"))
    for words in (
        "No verdict",
        "The share of ‖ΔW‖ that a variant moves was not measured in this run.",
        "No guard and no divergence on general text was measured",
        "test split openednot recorded",
        "This run does not hold its prompts",
    ):
        assert words in page.text
    assert "‖ΔW‖ moved" not in page.text


def test_a_run_without_guards_but_with_divergence_shows_that(tmp_path: Path) -> None:
    made = dataclasses.replace(SMALL, guards=(), change=lambda row: {**row, "guard_share": None})
    page = build(tmp_path / "run", made)
    assert "KL to the target" in page.text
    assert "No guard and no divergence" not in page.text


def failed(row: Row) -> Row:
    spoiled = dict.fromkeys(("correct", "accuracy", "ci_low", "ci_high", "tir", "recovery"))
    return {**row, **spoiled, "error": "CUDA out of memory\nat line 1"} if row["role"] == "trial" else row


def test_a_run_in_which_all_trials_failed_says_so_and_why(tmp_path: Path) -> None:
    page = build(tmp_path / "run", dataclasses.replace(SMALL, winner=False, change=failed, guards=()))
    assert "No winner" in page.text
    assert "2 of 2 trials failed" in page.text
    assert page.text.count("CUDA out of memory at line 1") == 2
    assert "No trial answered all examples, so there is no curve." in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_search_that_failed_is_told_with_its_reason(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    summary = folder.read_summary()
    folder.summary.write_text(json.dumps({**summary, "failed_searches": {"gates": "NumericsError: the loss is NaN\nat step 3"}}))
    assert "Search gates failed: NumericsError: the loss is NaN" in Page.of(build_report(folder).read_text(encoding="utf-8")).text


def test_a_run_without_a_winner_still_shows_its_curves(tmp_path: Path) -> None:
    page = build(tmp_path / "run", dataclasses.replace(SMALL, winner=False))
    assert "no trial answered all examples" not in page.text.split("How many modules")[1]
    assert any(label.startswith("Accuracy on select over K") for tag, _, label in page.attributes if tag == "svg")
    assert "Nothing: there is no winner." in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_winner_that_was_not_confirmed_is_said_to_be_flattered(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run",
        dataclasses.replace(SMALL, change=lambda row: {**row, "winner": row["winner"] and row["split"] == "select"}),
    )
    page = Page.of(build_report(folder).read_text(encoding="utf-8"))
    assert "are from select, on which it was chosen" in page.text
    assert "Winner, select" in page.text


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=f"{re.escape(str(place))}/summary.json: not there. Is .* a run folder"):
            build_report(RunFolder(place))
    write_run(tmp_path / "run", SMALL).results.unlink()
    with pytest.raises(RunError, match=r"results\.parquet: not there"):
        build_report(RunFolder(tmp_path / "run"))


DAMAGES: Mapping[str, tuple[bytes, str]] = {
    "results.parquet": (b"PAR1 no", "results.parquet: not a readable Parquet file"),
    "rankings.parquet": (b"", "rankings.parquet: not a readable Parquet file"),
    "guards.parquet": (b"x", "guards.parquet: not a readable Parquet file"),
    "examples.parquet": (b"x", "examples.parquet: not a readable Parquet file"),
    "outcomes/test.parquet": (b"x", "test.parquet: not a readable Parquet file"),
    "summary.json": (b"{", "summary.json: not a readable summary"),
    "recipe.yaml": (b"a: [", "recipe.yaml: not a readable recipe"),
    "delta/variant.json": (b'{"coefficients": {"x": "y"}}', "variant.json: has no `coefficients`"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_and_no_report_is_written(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    content, words = DAMAGES[name]
    (folder.path / name).write_bytes(content)
    with pytest.raises(RunError, match=words):
        build_report(folder)
    assert not any(path.exists() for path in folder.reports)


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
def test_a_summary_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    folder.summary.write_text(content)
    with pytest.raises(RunError, match=r"summary\.json: not a readable summary \(found .*, expected an object\)"):
        build_report(folder)


@pytest.mark.parametrize(
    "name", ["rankings.parquet", "guards.parquet", "examples.parquet", "outcomes/test.parquet", "recipe.yaml", "delta/variant.json"]
)
@pytest.mark.usefixtures("no_figures")
def test_a_file_that_is_not_there_leaves_a_page_without_it(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    (folder.path / name).unlink()
    page = Page.of(build_report(folder).read_text(encoding="utf-8"))
    assert "Confirmed, with loss" in page.text
