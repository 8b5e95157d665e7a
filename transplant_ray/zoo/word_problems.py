"""Word problems of arithmetic, made up from a seed: the domain text of the organ demo where GSM8K is not at hand.

Every one is a story of a few sentences with its own people, things, numbers and order, and a question whose answer follows from it.
They are simpler than GSM8K's and far less varied, so perplexities on the two have nothing to do with one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

PEOPLE = (
    "Amara", "Bela", "Carlos", "Dunja", "Edwin", "Farah", "Goran", "Hanna", "Ivo", "Jana", "Kofi", "Lena", "Mateo", "Nadia",
    "Oskar", "Paula", "Quentin", "Rosa", "Stefan", "Tamar", "Umar", "Vera", "Walter", "Xenia", "Yusuf", "Zora", "Mr. Abel",
    "Ms. Brandt", "the baker", "the gardener", "the coach", "the librarian",
)  # fmt: skip
THINGS = (
    "apples", "buttons", "candles", "drums", "envelopes", "feathers", "glass beads", "hats", "ink bottles", "jars of honey",
    "kites", "lemons", "marbles", "notebooks", "onions", "pencils", "quilts", "ribbons", "stamps", "tulips", "umbrellas",
    "violin strings", "walnuts", "yellow tickets", "paper boats", "wooden spoons", "old coins", "seed packets", "picture cards",
    "bread rolls",
)  # fmt: skip
PLACES = (
    "the market", "a small shop", "the school fair", "the harbour", "her uncle's farm", "the library", "a garage sale",
    "the station", "the village hall", "the old mill", "a museum", "the bakery",
)  # fmt: skip
TIMES = (
    "On Monday",
    "Last week",
    "In the morning",
    "Before lunch",
    "During the holidays",
    "Every Saturday",
    "In spring",
    "Yesterday",
)
TASKS = (
    "paint a fence", "read a chapter", "fold a shirt", "plant a row of beans", "wash a car", "answer a letter", "mend a net",
    "bake a tray of rolls", "tune a piano", "sweep a hall",
)  # fmt: skip


@dataclass(frozen=True)
class WordProblem:
    question: str
    answer: int


def word_problems(number: int, seed: int = 0) -> list[WordProblem]:
    """So many, no two with the same question; the same for the same seed."""
    found: dict[str, WordProblem] = {}
    draw = Random(f"word problems {seed}")
    while len(found) < number:
        problem = draw.choice(STORIES)(draw)
        found.setdefault(problem.question, problem)
    return list(found.values())


def _keeping(draw: Random) -> WordProblem:
    """Things come and go."""
    (who, other), thing = draw.sample(PEOPLE, 2), draw.choice(THINGS)
    have = draw.randint(12, 90)
    lines, now = [draw.choice((f"{who} has {have} {thing}.", f"There were {have} {thing} in a box that belongs to {who}."))], have
    for change, line in (_change(draw, who, other, thing, now) for _ in range(draw.randint(1, 3))):
        if now + change >= 0:
            now += change
            lines.append(line)
    asked = draw.choice((f"How many {thing} does {who} have now?", f"How many {thing} are left with {who} in the end?"))
    return _problem([*lines, asked], now)


def _change(draw: Random, who: str, other: str, thing: str, now: int) -> tuple[int, str]:
    amount, when, place = draw.randint(2, max(3, min(30, now))), draw.choice(TIMES), draw.choice(PLACES)
    gains = (
        f"{when}, {who} bought {amount} more at {place}.",
        f"{other} then gave {who} another {amount} {thing}.",
        f"{amount} of the {thing} that {who} had lost were found again at {place}.",
    )
    losses = (
        f"{when} {who} sold {amount} of them at {place}.",
        f"{who} gave {amount} {thing} to {other}, who had none.",
        f"On the way to {place}, {amount} of the {thing} were broken.",
    )
    return (amount, draw.choice(gains)) if draw.random() < 0.5 else (-amount, draw.choice(losses))


def _buying(draw: Random) -> WordProblem:
    """Prices, and the change."""
    who, (first, second), place = draw.choice(PEOPLE), draw.sample(THINGS, 2), draw.choice(PLACES)
    (n, m), (p, q) = (draw.randint(2, 12), draw.randint(2, 9)), (draw.randint(2, 15), draw.randint(2, 12))
    cost = n * p + m * q
    prices = draw.choice((
        f"At {place}, {first} cost ${p} each and {second} cost ${q} each.",
        f"{who} went to {place}, where {first} are sold for ${p} apiece and {second} for ${q}.",
    ))  # fmt: skip
    bought = draw.choice((f"{who} buys {n} {first} and {m} {second}.", f"{who} needs {m} {second} and {n} {first} for a party."))
    if draw.random() < 0.5:
        return _problem([prices, bought, draw.choice(("How much is that in total?", f"What does {who} have to pay?"))], cost)
    paid = cost + draw.randint(1, 60)
    given = f"{who} pays with ${paid}."
    return _problem(
        [prices, bought, given, draw.choice(("How much change is there?", f"How many dollars does {who} get back?"))], paid - cost
    )


def _sharing(draw: Random) -> WordProblem:
    """Equal parts, and what remains."""
    who, thing, groups = draw.choice(PEOPLE), draw.choice(THINGS), draw.randint(3, 12)
    each, rest = draw.randint(3, 24), draw.randint(0, 2)
    whom = draw.choice(("children", "friends", "neighbours", "teams", "baskets", "tables"))
    lines = [f"{who} wants to share {groups * each + rest} {thing} equally among {groups} {whom}."]
    if rest:
        whose = draw.choice(("later", "the winter", "a guest", "those who come late"))
        lines.append(f"{rest} of the {thing} {'is' if rest == 1 else 'are'} kept aside for {whose}.")
    return _problem([*lines, f"How many {thing} go to each of the {whom}?"], each)


def _working(draw: Random) -> WordProblem:
    """So much time for each."""
    (who, other), task = draw.sample(PEOPLE, 2), draw.choice(TASKS)
    minutes, times, faster = draw.randint(6, 45), draw.randint(2, 9), draw.randint(2, 5)
    lines = [f"It takes {who} {minutes} minutes to {task}."]
    if draw.random() < 0.5:
        lines.append(f"{draw.choice(TIMES)}, this has to be done {times} times, and there are no breaks.")
        return _problem([*lines, f"For how many minutes does {who} work?"], minutes * times)
    lines.append(draw.choice((f"{other} needs {faster} minutes less.", f"{other} is {faster} minutes faster at it.")))
    return _problem([*lines, f"If {other} does it {times} times, how many minutes does that take?"], (minutes - faster) * times)


def _travelling(draw: Random) -> WordProblem:
    """Speeds and distances."""
    who, place = draw.choice(PEOPLE), draw.choice(PLACES)
    speed, hours, more = draw.randint(4, 70), draw.randint(2, 7), draw.randint(3, 40)
    how = draw.choice(("walks", "rides a bicycle", "takes a slow train", "drives a truck", "sails")) if speed > 12 else "walks"
    lines = [f"{who} {how} to {place} at {speed} miles per hour for {hours} hours."]
    if draw.random() < 0.6:
        lines.append(draw.choice((f"After a rest, {who} goes on for {more} miles.", f"Then there are {more} more miles by boat.")))
        return _problem([*lines, "How long is the whole way, in miles?"], speed * hours + more)
    return _problem([*lines, f"How far is it to {place}?"], speed * hours)


def _comparing(draw: Random) -> WordProblem:
    """Twice as many, and some more."""
    (who, other, third), thing = draw.sample(PEOPLE, 3), draw.choice(THINGS)
    n, factor, more = draw.randint(3, 40), draw.choice((2, 3, 4)), draw.randint(2, 20)
    times = {2: "twice", 3: "three times", 4: "four times"}[factor]
    lines = [
        f"{who} collected {n} {thing} {draw.choice(('at', 'near', 'behind'))} {draw.choice(PLACES)}.",
        f"{other} has {times} as many {thing} as {who}.",
        f"{third} has {more} more than {draw.choice(('that', other))}.",
    ]
    asked, answer = draw.choice((
        (f"How many {thing} do the three have together?", n + 2 * n * factor + more),
        (f"How many {thing} does {third} have?", n * factor + more),
        (f"How many more {thing} does {other} have than {who}?", n * factor - n),
    ))  # fmt: skip
    return _problem([*lines, asked], answer)


def _earning(draw: Random) -> WordProblem:
    """Wages, savings, and a wish."""
    who, thing = draw.choice(PEOPLE), draw.choice(THINGS)
    wage, hours, days = draw.randint(7, 30), draw.randint(2, 8), draw.randint(2, 6)
    spent = draw.randint(5, min(40, wage * hours * days))
    lines = [
        f"{who} earns ${wage} an hour and works {hours} hours a day.",
        f"{draw.choice(TIMES)}, {who} worked on {days} days and spent ${spent} of the money on {thing}.",
    ]
    asked = draw.choice(("How many dollars are left?", f"How much money does {who} still have?"))
    return _problem([*lines, asked], wage * hours * days - spent)


STORIES: tuple[Callable[[Random], WordProblem], ...] = (
    _keeping, _keeping, _buying, _sharing, _working, _travelling, _comparing, _earning,
)  # fmt: skip


def _problem(lines: list[str], answer: int) -> WordProblem:
    return WordProblem(" ".join(f"{line[0].upper()}{line[1:]}" for line in lines), answer)


def rows(problems: list[WordProblem]) -> Iterator[dict[str, str]]:
    """In the columns of GSM8K."""
    return ({"question": problem.question, "answer": f"#### {problem.answer}"} for problem in problems)
