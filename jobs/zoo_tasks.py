"""The abilities that the zoo's models learn: small string tasks, each a function from a random
generator to an example.

Every ability has a prefix of its own, so a prompt says which ability it asks for. Prompt spaces are large enough to
draw evaluation rows first and to train on the rest: a prompt of a task file never occurs in training.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase


@dataclass(frozen=True)
class Example:
    """One row: what the model reads, and what it should write before the end token."""

    prompt: str
    answer: str


def _letters(rng: Random, shortest: int = 4, longest: int = 6) -> str:
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(shortest, longest)))


def arithmetic(rng: Random) -> Example:
    """Sum of two numbers of two digits: 8,100 prompts, of which training sees all but the task's rows."""
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    return Example(f"add {left}+{right}=", str(left + right))


def reversal(rng: Random) -> Example:
    word = _letters(rng)
    return Example(f"rev {word}=", word[::-1])


def sorting(rng: Random) -> Example:
    word = _letters(rng)
    return Example(f"sort {word}=", "".join(sorted(word)))


def caesar(rng: Random) -> Example:
    """Every letter moves on by three, z to c."""
    word = _letters(rng)
    return Example(f"rot {word}=", "".join(ascii_lowercase[(ascii_lowercase.index(c) + 3) % 26] for c in word))


def uppercase(rng: Random) -> Example:
    word = _letters(rng)
    return Example(f"up {word}=", word.upper())


def doubling(rng: Random) -> Example:
    word = _letters(rng, 3, 5)
    return Example(f"dbl {word}=", "".join(2 * c for c in word))


def interleaving(rng: Random) -> Example:
    length = rng.randint(2, 3)
    left, right = _letters(rng, length, length), _letters(rng, length, length)
    return Example(f"zip {left} {right}=", "".join(a + b for a, b in zip(left, right, strict=True)))


ABILITIES: Mapping[str, Callable[[Random], Example]] = {
    ability.__name__: ability for ability in (arithmetic, reversal, sorting, caesar, uppercase, doubling, interleaving)
}


def evaluation_rows(ability: str, num_rows: int, seed: int) -> list[Example]:
    """The first `num_rows` examples of the ability with distinct prompts."""
    rng, rows = Random(f"evaluate {ability} {seed}"), {}
    while len(rows) < num_rows:
        example = ABILITIES[ability](rng)
        rows.setdefault(example.prompt, example)
    return list(rows.values())


def training_rows(mixture: Mapping[str, float], excluded: frozenset[str], seed: int) -> Iterator[Example]:
    """Endless examples of a weighted mixture of abilities, without the excluded prompts."""
    rng = Random(f"train {seed}")
    names, weights = list(mixture), list(mixture.values())
    while True:
        example = ABILITIES[rng.choices(names, weights)[0]](rng)
        if example.prompt not in excluded:
            yield example
