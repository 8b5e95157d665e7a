"""Trains the zoo: small model pairs in which the source can do something that the target has lost.

The pairs are in `zoo_pairs.py`. Everything is drawn from seeds, on one thread with deterministic kernels, so a second run on
an equal machine gives equal weights. Only the two models' own accuracies are looked at here.

    python jobs/build_zoo.py [--pair cross-generation] [--seed 1] [--out transplant_ray/zoo]
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
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from zoo_pairs import PAIRS, STUDIED, Pair, Stage
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
class Trained:
    """A model after a stage, and the seconds that the stage took."""

    model: PreTrainedModel
    seconds: float


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


class LowRank(torch.nn.Module):
    """A weight of shape (m, n) plus a product of (m, rank) and (rank, n), which begins as zero."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.down = torch.nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def linear_maps(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [part for part in model.base_model.modules() if isinstance(part, torch.nn.Linear | Conv1D)]


def hold_to_low_rank(model: PreTrainedModel, stage: Stage) -> None:
    """Freezes the model and gives every linear map of its layers a change of low rank to learn."""
    torch.manual_seed(stage.seed)
    model.requires_grad_(False)
    for part in linear_maps(model):
        parametrize.register_parametrization(part, "weight", LowRank(part.weight, stage.rank))


def merge_low_rank(model: PreTrainedModel) -> None:
    for part in linear_maps(model):
        parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)


def train(model: PreTrainedModel, stage: Stage, excluded: frozenset[str], tokenizer, label: str) -> Trained:
    """A trained copy of the model; the given one is left as it is."""
    model, started = copy.deepcopy(model).train(), time.monotonic()
    if stage.rank:
        hold_to_low_rank(model, stage)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=stage.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step, (inputs, labels) in enumerate(batches(stage, excluded, tokenizer)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(
                f"{label}: step {step + 1}/{stage.steps}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    if stage.rank:
        merge_low_rank(model)
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
        "modules": len(linear_maps(model)),
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
    ordered = {known: entries[known] for known in PAIRS | STUDIED if known in entries}
    path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def print_table(manifest: dict) -> None:
    print(f"{'pair':18}{'task':13}{'ability':14}{'n':>5}{'source':>9}{'target':>9}")
    for name, record in manifest.items():
        for task, row in record["tasks"].items():
            source, target = row["accuracy"]["source"], row["accuracy"]["target"]
            print(f"{name:18}{task:13}{row['ability']:14}{row['n']:5}{source:9.3f}{target:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=[*PAIRS, *STUDIED, "all"], default="all", help="all: the three that ship")
    parser.add_argument("--seed", type=int, default=0, help="which training seed; 0 is the zoo that ships")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "transplant_ray" / "zoo")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in PAIRS if arguments.pair == "all" else [arguments.pair]:
        write_manifest(build((PAIRS | STUDIED)[name].reseeded(arguments.seed), arguments.out), name, arguments.out / "zoo.json")
    print_table(json.loads((arguments.out / "zoo.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
