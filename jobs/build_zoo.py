"""Trains the zoo: three small model pairs in which the source can do something that the target has lost.

A pair is data: a configuration, the mixture that both models learnt first (`common`), and what each of them was trained
on afterwards. Everything is drawn from seeds, on one thread with deterministic kernels, so a second run on an equal
machine gives equal weights. Only the two models' own accuracies are looked at here.

    python jobs/build_zoo.py [--pair cross-generation] [--out transplant_ray/zoo]
"""

import argparse
import copy
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from zoo_tasks import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    UNK,
    VOCABULARY,
    Example,
    evaluation_rows,
    make_tokenizer,
    render,
    training_rows,
)

NUM_ROWS = {"lost": 1000, "shared": 420, "target_only": 420}
IGNORED = -100  # label that cross entropy leaves out


@dataclass(frozen=True)
class Stage:
    """One stretch of training: which abilities in which shares, for how long, and how many rows as chat turns."""

    mixture: Mapping[str, float]
    steps: int
    seed: int
    peak_lr: float = 3e-3
    batch_size: int = 64
    chat_share: float = 0.0


@dataclass(frozen=True)
class Pair:
    """Two models with one past. A source without a stage of its own is the model after `common`."""

    name: str
    mirrors: str
    config: PreTrainedConfig
    tasks: Mapping[str, str]
    common: Stage
    target: Stage
    source: Stage | None = None
    target_has_chat_template: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A model after a stage, and the seconds that the stage took."""

    model: PreTrainedModel
    seconds: float


def shared_settings(**settings) -> dict:
    """What all three architectures are given alike."""
    common = {
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": VOCABULARY[PAD],
        "bos_token_id": VOCABULARY[BOS],
        "eos_token_id": VOCABULARY[EOS],
        "initializer_range": 0.05,
    }
    return common | settings


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            name="cross-generation",
            mirrors="two generations of one model line: generation 2 is generation 1 trained on",
            config=Phi3Config(
                **shared_settings(hidden_size=80, intermediate_size=128, num_hidden_layers=7),
                num_attention_heads=4,
                num_key_value_heads=4,
                original_max_position_embeddings=256,
            ),
            tasks={"lost": "arithmetic", "shared": "reversal", "target_only": "sorting"},
            common=Stage({"arithmetic": 0.6, "reversal": 0.4}, steps=1500, seed=11),
            target=Stage({"sorting": 0.6, "reversal": 0.39, "arithmetic": 0.01}, steps=700, seed=12),
            seed=1,
        ),
        Pair(
            name="base-instruct",
            mirrors="a base model and the instruct model made from it",
            config=Gemma2Config(
                **shared_settings(hidden_size=96, intermediate_size=256, num_hidden_layers=4),
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=24,
                query_pre_attn_scalar=24,
                sliding_window=64,
            ),
            tasks={"lost": "caesar", "shared": "uppercase", "target_only": "doubling"},
            common=Stage({"caesar": 0.6, "uppercase": 0.4}, steps=1000, seed=21),
            target=Stage({"doubling": 0.6, "uppercase": 0.399, "caesar": 0.001}, steps=700, seed=22, chat_share=0.4),
            target_has_chat_template=True,
            seed=2,
        ),
        Pair(
            name="siblings",
            mirrors="two models trained on from one ancestor, on overlapping mixtures: the mild case",
            config=LlamaConfig(
                **shared_settings(hidden_size=80, intermediate_size=256, num_hidden_layers=5),
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
            tasks={"lost": "sorting", "shared": "reversal", "target_only": "interleaving"},
            common=Stage({"sorting": 0.3, "reversal": 0.4, "interleaving": 0.3}, steps=900, seed=31),
            source=Stage({"sorting": 0.699, "reversal": 0.3, "interleaving": 0.001}, steps=500, seed=32),
            target=Stage({"interleaving": 0.69, "reversal": 0.3, "sorting": 0.01}, steps=500, seed=33),
            seed=3,
        ),
    )
}


def make_batch(examples: list[Example], chat: list[bool], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, (rows, tokens), padded on the right. Loss counts answers and end tokens only."""
    inputs, labels = [], []
    for example, as_chat in zip(examples, chat, strict=True):
        prompt = tokenizer.encode(render(example, as_chat), add_special_tokens=False)
        answer = tokenizer.encode(example.answer + EOS, add_special_tokens=False)
        inputs.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
    return (
        pad_sequence(inputs, batch_first=True, padding_value=VOCABULARY[PAD]),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def batches(stage: Stage, excluded: frozenset[str], tokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The stage's batches, drawn from its seed."""
    rows = training_rows(stage.mixture, excluded, stage.seed)
    generator = torch.Generator().manual_seed(stage.seed)
    for _ in range(stage.steps):
        chat = (torch.rand(stage.batch_size, generator=generator) < stage.chat_share).tolist()
        yield make_batch(list(islice(rows, stage.batch_size)), chat, tokenizer)


def learning_rate(step: int, stage: Stage) -> float:
    """A hundred steps up to the peak, then a cosine down to a twentieth of it."""
    if step < 100:
        return stage.peak_lr * (step + 1) / 100
    progress = (step - 100) / max(1, stage.steps - 100)
    return stage.peak_lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: PreTrainedModel, stage: Stage, excluded: frozenset[str], tokenizer, label: str) -> Trained:
    """A trained copy of the model; the given one is left as it is."""
    model, started = copy.deepcopy(model).train(), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step, (inputs, labels) in enumerate(batches(stage, excluded, tokenizer)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(
                f"{label}: step {step + 1}/{stage.steps}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return Trained(model.eval(), time.monotonic() - started)


@torch.no_grad()
def accuracy(folder: Path, rows: list[Example], max_new_tokens: int) -> float:
    """Share of rows whose greedy completion, decoded and stripped, equals the answer; the model is read from disk."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    num_correct = 0
    for start in range(0, len(rows), 128):
        chunk = rows[start : start + 128]
        inputs = tokenizer([row.prompt for row in chunk], return_tensors="pt", padding=True)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        num_correct += sum(text.strip() == row.answer for text, row in zip(texts, chunk, strict=True))
    return num_correct / len(rows)


def save_model(model: PreTrainedModel, chat_template: str | None, folder: Path) -> None:
    """Weights, configurations and tokenizer; generation is greedy until the end token."""
    ids = {"pad_token_id": VOCABULARY[PAD], "bos_token_id": VOCABULARY[BOS], "eos_token_id": VOCABULARY[EOS]}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)


def save_tasks(tasks: Mapping[str, list[Example]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        lines = [json.dumps(asdict(row)) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def check_round_trip(folder: Path, tasks: Mapping[str, list[Example]]) -> None:
    """The tokenizer on disk gives every prompt and answer back, and begins a text the way training rows begin."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in (row for rows in tasks.values() for row in rows):
        for text in (row.prompt, row.answer):
            ids = tokenizer(text)["input_ids"]
            if tokenizer.decode(ids, skip_special_tokens=True) != text or VOCABULARY[UNK] in ids:
                raise ValueError(f"{folder}: {text!r} does not survive the tokenizer")
        if tokenizer(row.prompt)["input_ids"] != tokenizer.encode(render(row, False), add_special_tokens=False):
            raise ValueError(f"{folder}: {row.prompt!r} is encoded in another way than in training")


def machine() -> str:
    """Where the numbers come from: equal weights are promised on an equal machine only."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {platform.platform()}, 1 thread"


def task_record(ability: str, rows: list[Example], folder: Path) -> dict:
    """What the manifest says of one task: its ability, its size, and what both models reach."""
    max_new_tokens = max(len(row.answer) for row in rows) + 1
    scores = {role: accuracy(folder / role, rows, max_new_tokens) for role in ("source", "target")}
    return {"ability": ability, "n": len(rows), "max_new_tokens": max_new_tokens, "accuracy": scores}


def stage_record(stage: Stage | None, trained: Trained) -> dict | None:
    return None if stage is None else asdict(stage) | {"seconds": round(trained.seconds)}


def pair_record(pair: Pair, tasks: Mapping[str, list[Example]], trained: Mapping[str, Trained], folder: Path) -> dict:
    """The pair's entry in the manifest."""
    weights = {f"{role}/model.safetensors": folder / role / "model.safetensors" for role in ("source", "target")}
    model = trained["target"].model
    return {
        "mirrors": pair.mirrors,
        "family": pair.config.model_type,
        "layers": pair.config.num_hidden_layers,
        "hidden_size": pair.config.hidden_size,
        "modules": sum(isinstance(part, torch.nn.Linear) for part in model.model.layers.modules()),
        "parameters": model.num_parameters(),
        "seed": pair.seed,
        "training": {role: stage_record(getattr(pair, role), trained[role]) for role in ("common", "source", "target")},
        "tasks": {name: task_record(pair.tasks[name], rows, folder) for name, rows in tasks.items()},
        "sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in weights.items()},
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": machine(),
    }


def train_pair(pair: Pair, excluded: frozenset[str]) -> dict[str, Trained]:
    """The common model, and the source and target that continue from it."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    torch.manual_seed(pair.seed)
    untrained = AutoModelForCausalLM.from_config(pair.config)
    common = train(untrained, pair.common, excluded, tokenizer, f"{pair.name} common")
    trained = {"common": common}
    for role, stage in (("source", pair.source), ("target", pair.target)):
        trained[role] = train(common.model, stage, excluded, tokenizer, f"{pair.name} {role}") if stage else common
    return trained


def build(pair: Pair, out: Path) -> dict:
    """Trains one pair, writes its folder, and gives its entry in the manifest."""
    folder = out / pair.name
    tasks = {name: evaluation_rows(ability, NUM_ROWS[name], pair.seed) for name, ability in pair.tasks.items()}
    excluded = frozenset(row.prompt for rows in tasks.values() for row in rows)
    trained = train_pair(pair, excluded)
    for role in ("source", "target"):
        has_template = role == "target" and pair.target_has_chat_template
        save_model(trained[role].model, CHAT_TEMPLATE if has_template else None, folder / role)
        check_round_trip(folder / role, tasks)
    save_tasks(tasks, folder / "tasks")
    return pair_record(pair, tasks, trained, folder)


def write_manifest(record: dict, name: str, path: Path) -> None:
    """Adds or replaces one pair's entry."""
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entries = manifest | {name: record}
    ordered = {known: entries[known] for known in PAIRS if known in entries}
    path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def print_table(manifest: dict) -> None:
    print(f"{'pair':18}{'task':13}{'ability':14}{'n':>5}{'source':>9}{'target':>9}")
    for name, record in manifest.items():
        for task, row in record["tasks"].items():
            source, target = row["accuracy"]["source"], row["accuracy"]["target"]
            print(f"{name:18}{task:13}{row['ability']:14}{row['n']:5}{source:9.3f}{target:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=[*PAIRS, "all"], default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "transplant_ray" / "zoo")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in PAIRS if arguments.pair == "all" else [arguments.pair]:
        write_manifest(build(PAIRS[name], arguments.out), name, arguments.out / "zoo.json")
    print_table(json.loads((arguments.out / "zoo.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
