r"""Scorers: what each reads out of a completion, what it calls equal, and that no text makes one of them stop or stall."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transplant_ray import recipe
from transplant_ray.errors import RecipeError
from transplant_ray.evaluate import math_answers, scorers
from transplant_ray.evaluate.boxed import last_boxed, normalise
from transplant_ray.evaluate.guarded import Worker
from transplant_ray.evaluate.math_answers import Comparison, MathWorker
from transplant_ray.evaluate.scorers import REGEX, SCORERS, Grade, check_scorer, exact, find_scorer, math, number, strict_boxed

TEXT = st.text(st.sampled_from("\\boxed{}frac12 sqrt.-$,#=x%\n/") | st.characters())
PURE = {name: scorer for name, scorer in SCORERS.items() if name != "math"}


@pytest.mark.parametrize("name", PURE)
@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT)
def test_any_text_gets_a_grade(name: str, completion: str, answer: str) -> None:
    found = PURE[name](completion, answer)
    assert isinstance(found.correct, bool)
    assert found.error is None
    assert found.parsed is not None or not found.correct
    assert found == PURE[name](completion, answer)


def test_exact_parses_all_but_nothing() -> None:
    assert exact(" 15\n", "15") == Grade(True, "15")
    assert exact(" \n", "15") == Grade(False, None)


# The box.


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{5}", "5"),
        (r"so \boxed{4}, no, $\boxed{5}$.", "5"),
        (r"\boxed{\frac{1}{2}} and more", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{4} then \boxed{5", "4"),
        (r"} { \boxed{5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        (r"\boxed 5", None),
        (r"{5}", None),
        ("", None),
    ],
)
def test_the_last_box_whose_braces_balance_is_found(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


BALANCED = st.recursive(
    st.text(st.characters(exclude_characters="{}\\")),
    lambda inner: st.tuples(inner, inner).map(lambda parts: f"{parts[0]}{{{parts[1]}}}"),
)


@settings(max_examples=100, deadline=None)
@given(BALANCED, st.text(st.characters(exclude_characters="{}\\")))
def test_what_is_boxed_comes_back(inner: str, around: str) -> None:
    assert last_boxed(f"{around}\\boxed{{{inner}}}{around}") == inner


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("5", "5"),
        (" 5 ", "5"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        ("1/2", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        (".25", "0.25"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$18", "18"),
        (r"50\%", "50"),
        ("k = 3", "3"),
        (r"5.4 \text{ cents}", "5.4"),
        (r"10\!,\!000", "10,000"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)
def test_spellings_of_one_answer_are_equal(said: str, answer: str) -> None:
    for reference in (answer, f"\\boxed{{{answer}}}", f"First, $\\boxed{{0}}$. Then ${{}}\\boxed{{{answer}}}$."):
        assert strict_boxed(f"It is $\\boxed{{{said}}}$.", reference) == Grade(True, said)


@pytest.mark.parametrize(
    ("said", "answer"),
    [("5", "6"), ("2x", "x2"), (r"\frac{2}{4}", r"\frac{1}{2}"), ("x+1", "1+x"), (r"\sqrt{9}", "3"), ("abc = 3", "3"), ("-5", "5")],
)
def test_other_answers_are_not(said: str, answer: str) -> None:
    assert not strict_boxed(f"\\boxed{{{said}}}", answer).correct


@pytest.mark.parametrize("completion", ["5", r"\boxed{}", r"\boxed{ }", r"\boxed{5", ""])
def test_without_a_box_there_is_no_boxed_answer(completion: str) -> None:
    assert strict_boxed(completion, "5") == Grade(False, None)


@pytest.mark.parametrize("text", ["\\boxed{" * 200_000, "{" * 10**6, "\\boxed{" + "\\text{ " * 100_000 + "}", "1," * 500_000])
def test_megabytes_are_read_in_a_moment(text: str) -> None:
    start = time.perf_counter()
    normalise(text)
    strict_boxed(text, "5")
    number(text, "5")
    assert time.perf_counter() - start < 5  # a tenth of that alone on a machine; quadratic time would take hours


# Numbers.


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("She pays 3 * 6 = 18 dollars.", "18"),
        ("#### 18", "18"),
        ("####18\nQuestion: 5 apples", "18"),
        ("7 eggs\n#### $1,450,000.\n", "1450000"),
        ("#### **18**", "18"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### Step 1\nso it is 7", "7"),
        ("#### \nThe answer: .5 miles", ".5"),
        ("18.00", "18.00"),
        ("it is 18.", "18"),
        ("50%", "50"),
        ("$1{,}234$", "1234"),
        ("\\$5", "5"),
        ("1, 2, 3", "3"),
        ("5-3", "3"),
        ("x=-3", "-3"),
        ("(−3)", "-3"),
        ("no idea", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_number_that_is_read(completion: str, said: str | None) -> None:
    assert number(completion, "0").parsed == said


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**12), 10**12), st.sampled_from(["{:d}", "{:,d}", "{:d}.0", "{:,d}.00", "It is {:d}.", "9 × 2\n#### {:,d}"]))
def test_a_number_is_equal_however_it_is_written(value: int, template: str) -> None:
    for reference in (str(value), f"{value:,}", f"2 + 2 = <<2+2=4>>4\n#### {value:,}"):
        assert number(template.format(value), reference).correct
        assert not number(template.format(value + 1), reference).correct


# Patterns.


def test_a_pattern_reads_its_group_where_it_matches_last() -> None:
    scorer = find_scorer(r"regex:answer: (\w+)")
    assert scorer("answer: a, no, answer: b.", "b") == Grade(True, "b")
    assert scorer("answer: b, no, answer: a.", "b") == Grade(False, "a")
    assert scorer("b", "b") == Grade(False, None)
    assert scorer("answer: b", "a whole solution, answer: b") == Grade(True, "b")


def test_a_group_that_took_no_part_is_no_match() -> None:
    assert find_scorer("regex:(?:x(a)|y)")("xa y", "a") == Grade(True, "a")
    assert find_scorer("regex:(?:x(a)|y)")("y", "a") == Grade(False, None)


def test_the_recipe_writes_a_pattern_as_it_is_read() -> None:
    assert recipe.REGEX == REGEX


def test_a_scorer_is_found_by_name() -> None:
    assert {find_scorer(name) for name in SCORERS} == set(SCORERS.values())


# Mathematics, in a process of its own.


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", True),
        (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{1+x}", "x+1", True),
        (r"\boxed{\sqrt{9}}", "3", True),
        (r"\boxed{\text{east}}", r"\text{east}", True),
        (r"\boxed{\text{west}}", r"\text{east}", False),
        (r"\boxed{4}, no, \boxed{5}", "5", True),
        (r"\boxed{5}, no, \boxed{4}", "5", False),
        ("So the answer is $\\frac{10}{2}$.", "5", True),
        ("It is 5.", "5", True),
    ],
)
def test_equal_mathematics_is_equal(completion: str, answer: str, right: bool) -> None:
    found = math(completion, answer)
    assert (found.correct, found.error) == (right, None)
    assert found.parsed


@pytest.mark.parametrize("completion", ["", "no idea", r"\boxed{}", r"\boxed{ }"])
def test_where_there_is_no_mathematics_nothing_is_parsed(completion: str) -> None:
    assert math(completion, "5") == Grade(False, None)


def test_an_answer_that_is_not_boxed_is_looked_for_at_the_end() -> None:
    assert math("word $7$ " * 200_000 + "The answer is $5$.", "5").correct


@pytest.fixture(scope="module")
def worker() -> Iterator[MathWorker]:
    worker = MathWorker(time_limit=1.0)
    yield worker
    worker.close()


HANGS = r"\boxed{9^{9^{9^{9}}}}"


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_what_hangs_is_wrong_after_the_time_limit_and_the_next_answer_is_judged(worker: MathWorker) -> None:
    assert worker.compare(r"\boxed{5}", "5") == Comparison(True, "5")
    first = worker.process
    assert first is not None
    assert worker.compare(r"\boxed{6}", "5") == Comparison(False, "6")
    assert worker.process is first  # reused
    start = time.perf_counter()
    assert worker.compare(HANGS, "5") == Comparison(False, None, "no answer within 1 s")
    assert time.perf_counter() - start < 3
    assert not alive(first.pid)
    assert worker.compare(r"\boxed{5}", "5") == Comparison(True, "5")


@pytest.mark.parametrize(
    "inner",
    [
        "\\frac{1}{" * 2000 + "2" + "}" * 2000,
        "1+" * 500_000 + "1",
        "\ud800",
        "\\input{/etc/passwd}",
        "__import__('os').abort()",
    ],
)
def test_hostile_latex_is_wrong_and_nothing_more(worker: MathWorker, inner: str) -> None:
    found = worker.compare(f"\\boxed{{{inner}}}", "5")
    assert not found.correct
    assert worker.compare(r"\boxed{5}", "5").correct


def test_a_process_that_dies_is_replaced(worker: MathWorker) -> None:
    assert worker.compare(r"\boxed{5}", "5").correct
    assert worker.process is not None
    worker.process.kill()
    worker.process.wait()
    assert worker.compare(r"\boxed{5}", "5").correct


def test_a_process_that_dies_over_an_answer_makes_it_wrong(worker: MathWorker) -> None:
    assert worker.compare(r"\boxed{5}", "5").correct
    assert worker.process is not None
    threading.Timer(0.2, worker.process.kill).start()
    assert worker.compare(HANGS, "5") == Comparison(False, None, "math-verify crashed")
    assert worker.compare(r"\boxed{5}", "5").correct


def test_an_interruption_leaves_no_late_answer_behind(worker: MathWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.compare(r"\boxed{7}", "5") == Comparison(False, "7")

    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.connection.Connection.poll", interrupt)
        with pytest.raises(KeyboardInterrupt):
            worker.compare(r"\boxed{8}", "5")
    assert worker.compare(r"\boxed{5}", "5") == Comparison(True, "5")


def test_threads_get_their_own_answers(worker: MathWorker) -> None:
    found: dict[int, Comparison] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: worker.compare(f"\\boxed{{{n}}}", str(n % 3))})) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: Comparison(n < 3, str(n)) for n in range(12)}


def test_a_time_out_is_an_error_of_the_grade(worker: MathWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers, "compare", worker.compare)
    assert math(HANGS, "5") == Grade(False, "9^{9^{9^{9}}}", "no answer within 1 s")


def test_the_process_ends_with_ours() -> None:
    code = (
        "from transplant_ray.evaluate import math_answers as m\n"
        "assert m.compare(r'\\boxed{5}', '5').correct\n"
        "print(m._worker().process.pid, flush=True)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not alive(int(out))


def test_a_missing_library_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers, "find_spec", lambda _: None)
    worker = MathWorker()
    with pytest.raises(RecipeError, match=re.escape(f"math-verify is not installed. Install it with {math_answers.INSTALL}")):
        worker.compare("5", "5")
    assert worker.process is None


def test_scorers_need_no_library_before_one_is_used() -> None:
    code = (
        "import sys; from transplant_ray.evaluate.scorers import number; number('5', '5')\n"
        "print([name for name in ('math_verify', 'sympy', 'pydantic', 'yaml', 'scipy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# Before a sweep, and on hostile text.


def test_what_a_scorer_needs_is_looked_for_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("exact", "forced", "choice", "number", "regex:(x)", "math"):
        check_scorer(name)
    with monkeypatch.context() as patch:
        patch.setattr(math_answers, "find_spec", lambda _: None)
        with pytest.raises(RecipeError, match="math-verify is not installed"):
            check_scorer("math")
    monkeypatch.setattr(math_answers, "_worker", lambda: Worker("transplant_ray.nothing", 1.0, "x"))
    monkeypatch.setattr(Worker, "check", MathWorker.check, raising=False)
    with pytest.raises(RecipeError, match="its process ended at the start"):
        check_scorer("math")


def test_a_system_without_such_pipes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(RecipeError, match="`scorer: math`: it needs a process with a pipe of its own"):
        MathWorker().check()


BACKTRACKS = r"((?:a|aa)+)$"


def test_a_pattern_that_backtracks_is_an_error_and_hangs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "MATCH_LIMIT", 0.3)
    scorer, hostile = find_scorer(f"regex:{BACKTRACKS}"), "a" * 200 + "b"
    assert scorer("b aaa", "aaa") == Grade(True, "aaa")
    expected = Grade(False, None, "no match within 0.3 s")
    assert scorer(hostile, "a") == expected
    before = scorers._matched.cache_info().misses
    assert scorer(hostile, "a") == scorer(hostile, "aa") == expected
    assert scorers._matched.cache_info().misses == before
    assert scorer("aa", hostile) == expected


def test_the_last_match_is_that_of_the_standard_library() -> None:
    rng = random.Random(0)
    for pattern in (r"x(\d*)", r"(?:a|(b))x?", r"^(.)$", r"(?m)^(.*)$", r"answer: (\S+)", r"(\d)(?=\d)"):
        for _ in range(200):
            text = "".join(rng.choice("abx12 \n") for _ in range(12))
            groups = [match[1].strip() for match in re.finditer(pattern, text) if match[1] is not None]
            assert find_scorer(f"regex:{pattern}")(text, "?").parsed == (groups[-1] if groups else None)
