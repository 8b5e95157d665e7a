"""Speed and memory of the training of organs against a bare loop: `python tests/bench/bench_training.py [--quick]`.

Timed are two things against it. The class `Training` in a bare process, reports of every 10th step and checkpoints of every 50th
included, but without Ray. And the same in a worker of Ray Train, as `organ train` runs it, timed in the driver: points come by
the bulletin, and Ray copies the checkpoint of every 200th step (up to 0.2 seconds each, so closer ones would cost more).
Starting Ray and its worker, and packing the text, are not in it; where Ray is not installed, that row is left out.

The bare loop is a dozen lines of PyTorch on the same model, batch, optimizer and dtype, with its tokens in memory, and no report,
checkpoint or clock but ours. Each runs in a process of its own, in turn; memory is the peak of the whole process (of torch's own
count on a GPU), and of the class alone, for Ray's own is no part of a training.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py
sys.path.insert(0, str(Path(__file__).parents[2]))  # the package, where it is not installed
# One thread, as torch reads it when it is imported: on a busy machine two wait for each other.
os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import get_context
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp

import torch
from stacks import Pair, make_pair
from table import Row, main
from tiny import tiny_tokenizer

from transplant_ray.organ.learners import OrganLearner
from transplant_ray.organ.pack import Pack, pack_text, training_cut
from transplant_ray.organ.progress import save_progress
from transplant_ray.organ.text import Passage
from transplant_ray.organ.training import Rank, Training
from transplant_ray.organ.wrapper import load_wrapper
from transplant_ray.recipe import TrainingSpec, WorkerSpec

CPU_SHAPE = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
GPU_SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
}  # fmt: skip
"""TinyLlama's."""
Measured = tuple[float, int]
"""Seconds a step, the median; the peak of memory in bytes."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def spec(steps: int) -> TrainingSpec:
    gpu = device().type == "cuda"
    sizes = {"context": 1024, "batch": 16, "dtype": "bfloat16"} if gpu else {"context": 64, "batch": 4, "dtype": "float32"}
    pauses = {"report_every": 10, "checkpoint_every": 50, "held_out": 0.1, "held_out_contexts": 8}
    return TrainingSpec.model_validate({"data": ["x"], "steps": steps, **sizes, **pauses})


def ours(pair: Pair, folder: Path, settings: TrainingSpec) -> Measured:
    """As a worker does it, points and checkpoints included; all of that time counts."""
    training = Training(load_wrapper(pair.recipient, pair.organ), Pack.open(folder / "pack"), settings, Rank(device=device()))
    times, steps = [], []
    for point in training.run():
        if training.is_due(point):
            with TemporaryDirectory() as state:
                save_progress(training, Path(state))
        times.append(time.perf_counter())
        steps.append(point.step)
    spans = [(later - earlier, b - a) for (earlier, later), (a, b) in zip(pairwise(times), pairwise(steps), strict=True)]
    whole = [span for span in spans[2:] if span[1]]  # the first steps fill caches
    return sum(seconds for seconds, _ in whole) / sum(number for _, number in whole), peak()


def bare(pair: Pair, folder: Path, settings: TrainingSpec) -> Measured:
    pack, there = Pack.open(folder / "pack"), device()
    model = load_wrapper(pair.recipient, pair.organ).to(there).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, fused=there.type == "cuda")
    tokens = pack.train.read(range(pack.train.num)).to(there)
    times = []
    for step in range(settings.num_steps):
        ids = tokens[[(step * settings.batch + row) % len(tokens) for row in range(settings.batch)]]
        with torch.autocast(there.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            loss.item()
            times.append(time.perf_counter())
    return (times[-1] - times[1]) / (10 * (len(times) - 2)), peak()


def in_a_worker(pair: Pair, folder: Path, settings: TrainingSpec) -> float:
    """Seconds a step, from the third point on."""
    import ray

    from transplant_ray.distributed import training as distributed

    distributed.POLL_SECONDS = 0.1  # the clock's precision
    learner, crew = OrganLearner(pair.recipient, pair.organ), WorkerSpec(cpus=1, gpus=int(device().type == "cuda"))
    attempts = Path(mkdtemp(prefix="attempts-", dir=folder))
    job = distributed.TrainingJob(learner, settings, folder / "pack", attempts, None, num_threads=1)
    times = []
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        distributed.run_training(job, crew, lambda point: times.append((time.perf_counter(), point.step)), print)
    finally:
        ray.shutdown()
    (start, first), (end, last) = times[2], times[-1]
    return (end - start) / (last - first)


def peak() -> int:
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(loop: Callable[[Pair, Path, TrainingSpec], Measured], pair: Pair, folder: Path, settings: TrainingSpec) -> Measured:
    """In a process of its own, for the peak of a process never falls."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(loop, (pair, folder, settings))


def rows(options: Namespace) -> Iterator[Row]:
    steps, rounds = (60, 1) if options.quick else (200, 5)
    settings = spec(steps)
    with TemporaryDirectory() as name:
        folder = Path(name)
        shape = {**(GPU_SHAPE if device().type == "cuda" else CPU_SHAPE), "max_position_embeddings": 2048}
        pair = make_pair(folder, **shape)
        texts = (Passage(f"{number} and {number * number}: " * 20) for number in range(100_000))
        pack_text(texts, tiny_tokenizer(), shape["vocab_size"], training_cut(settings), folder / "pack")
        found = [(alone(ours, pair, folder, settings), alone(bare, pair, folder, settings)) for _ in range(rounds)]
        sizes = f"3 layers of {shape['hidden_size']}, {settings.batch} × {settings.context} tokens, {settings.dtype}"
        yield from against_bare(found, f"{sizes}, {steps} steps", settings)
        if find_spec("ray") is None:
            return
        settings = settings.model_copy(update={"steps": 3 * steps, "checkpoint_every": steps})
        rounds = range(1 if options.quick else 3)
        both = [(in_a_worker(pair, folder, settings), alone(bare, pair, folder, settings)[0]) for _ in rounds]
        speeds = [reference / seconds for seconds, reference in both]
        tokens = settings.batch * settings.context / median(seconds for seconds, _ in both)
        shown = f"{median(speeds):.3f} × ({min(speeds):.3f}–{max(speeds):.3f}), {tokens:,.0f} tokens/s"
        what = "throughput of a worker of Ray Train against a bare loop"
        yield Row(what, f"{sizes}, {3 * steps} steps", f"{len(both)} rounds", shown, "≥ 0.9 ×", median(speeds) >= 0.9)


def against_bare(found: list[tuple[Measured, Measured]], sizes: str, settings: TrainingSpec) -> Iterator[Row]:
    speeds = [theirs[0] / mine[0] for mine, theirs in found]
    memory = [mine[1] / theirs[1] for mine, theirs in found]
    tokens = settings.batch * settings.context / median(mine[0] for mine, _ in found)
    rounds = f"{len(found)} rounds"
    shown = f"{median(speeds):.3f} × ({min(speeds):.3f}–{max(speeds):.3f}), {tokens:,.0f} tokens/s"
    yield Row("throughput of `Training`, without Ray, against a bare loop", sizes, rounds, shown, "≥ 0.9 ×", median(speeds) >= 0.9)
    shown = f"{median(memory):.3f} × ({min(memory):.3f}–{max(memory):.3f}), {found[0][0][1] / 2**20:,.0f} MiB"
    yield Row("peak memory of `Training`, without Ray, against a bare loop", sizes, rounds, shown, "≤ 1.1 ×", median(memory) <= 1.1)


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], {"training": rows}))
