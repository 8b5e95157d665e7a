"""What the zoo's models learn, as text and as tokens.

Abilities are small string tasks, each a function from a random generator to an example.

Every ability has a prefix of its own, so a prompt says which ability it asks for. Prompt spaces are large enough to
draw evaluation rows first and to train on the rest: a prompt of a task file never occurs in training.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK, USER, ASSISTANT = SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
CHARACTERS = ["\n", *map(chr, range(32, 127))]
VOCABULARY = {token: index for index, token in enumerate([*SPECIALS, *CHARACTERS])}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only the roles user and assistant are supported') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


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


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; a text begins with `<s>`, padding goes to the left."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    begins = [(BOS, VOCABULARY[BOS])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=begins)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    fast.chat_template = chat_template
    return fast


def render(example: Example, as_chat: bool) -> str:
    """The prompt as text, with the opening `<s>`, for a plain row or a chat row."""
    return f"{BOS}{USER}{example.prompt}{ASSISTANT}" if as_chat else f"{BOS}{example.prompt}"
