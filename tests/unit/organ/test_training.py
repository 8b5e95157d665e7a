"""The training is what a bare loop of PyTorch does, to the bit; stopped and begun again, it ends with the same weights."""

from __future__ import annotations

from math import cos, exp, isclose, pi
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stacks import Pair, make_pair
from trainings import begin, same, training_spec, weights_of

from transplant_ray.errors import NumericsError, ResourceError
from transplant_ray.organ.progress import Crew, Progress, latest_progress, read_progress, save_progress
from transplant_ray.organ.training import Point, Training, learning_rate
from transplant_ray.organ.wrapper import load_wrapper
from transplant_ray.tracking.training import point_metrics


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """GPT-2 has dropout, and biases that are not to decay."""
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


def run(training: Training) -> list[Point]:
    return list(training.run())


def test_it_is_a_bare_loop(pair: Pair, tmp_path: Path) -> None:
    ours = begin(pair, tmp_path / "pack", warmup=0.25, clip=0.5)
    if pair.family == "gpt2":  # which step draws which dropout is ours
        ours.model.eval()
        ours.model.train = lambda *_: ours.model  # type: ignore[method-assign,assignment,misc]
    points, spec = run(ours), ours.spec
    order = ours.order.blocks(0, 48)

    model = load_wrapper(pair.recipient, pair.organ).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() > 1) == decays] for decays in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    flat = np.fromfile(tmp_path / "pack" / "train.bin", dtype="uint16").astype(np.int64)
    losses = []
    for step in range(12):
        ids = torch.tensor(np.stack([flat[16 * block : 16 * block + 16] for block in order[4 * step : 4 * step + 4]]))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        share = (step + 1) / 3 if step < 3 else 0.1 + 0.9 * (1 + cos(pi * (step - 3) / 8)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * share
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    reference = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert same(weights_of(ours), reference)
    assert points[-1].loss == pytest.approx(sum(losses[-2:]) / 2)  # since the checkpoint of step 10
    assert (points[-1].step, points[-1].tokens) == (12, 12 * 4 * 16)
    assert spec.num_tokens == 12 * 4 * 16


def test_what_is_not_the_organ_stays_and_the_organ_learns(pair: Pair, tmp_path: Path) -> None:
    training = begin(pair, tmp_path / "pack", steps=40, lr=3e-3)
    before = {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}
    points = run(training)
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in training.parameters), name
    assert points[0].held_out is not None
    assert points[-1].held_out is not None
    assert points[-1].held_out < points[0].held_out - 0.3


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_stopped_and_begun_again_it_ends_with_the_same_weights(pair: Pair, tmp_path: Path, stop: int) -> None:
    calm = begin(pair, tmp_path / "pack", checkpoint_every=stop)
    points = run(calm)
    killed = begin(pair, tmp_path / "pack", checkpoint_every=stop)
    for point in killed.run():
        if killed.is_due(point):
            save_progress(killed, _made(tmp_path / "state"))
            break
    again = begin(pair, tmp_path / "pack", checkpoint_every=stop)
    progress = read_progress(tmp_path / "state")
    assert progress is not None
    assert progress.step == stop
    progress.restore(again)
    run(again)
    assert same(weights_of(again), weights_of(calm))
    assert same(again.moments(), calm.moments())
    assert again.curve == calm.curve == points


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_parts_of_a_batch_give_its_gradient(pair: Pair, tmp_path: Path) -> None:
    if pair.family == "gpt2":
        pytest.skip("dropout is drawn for every part")
    whole, parts = begin(pair, tmp_path / "a", lr=1e-4), begin(pair, tmp_path / "a", lr=1e-4, micro_batch=1)
    run(whole)
    run(parts)
    for name, weight in weights_of(whole).items():
        assert torch.allclose(weight, weights_of(parts)[name], atol=2e-5), name


def test_bfloat16_is_computed_in_and_not_kept_in(pair: Pair, tmp_path: Path) -> None:
    training = begin(pair, tmp_path / "pack", dtype="bfloat16")
    points = run(training)
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}
    exact = run(begin(pair, tmp_path / "pack"))
    assert points[0].held_out != exact[0].held_out
    assert points[0].held_out == pytest.approx(exact[0].held_out, rel=0.02)


def test_the_held_out_loss_is_that_of_the_held_out_blocks(pair: Pair, tmp_path: Path) -> None:
    training = begin(pair, tmp_path / "pack", held_out_contexts=3)
    blocks = training.pack.held_out.read(range(3))
    model = load_wrapper(pair.recipient, pair.organ).eval()
    with torch.no_grad():
        expected = float(model(input_ids=blocks, labels=blocks).loss)
    assert training.held_out_loss() == pytest.approx(expected, rel=1e-5)
    assert training.model.training


def test_without_held_out_text_there_is_no_such_loss(pair: Pair, tmp_path: Path) -> None:
    assert {point.held_out for point in run(begin(pair, tmp_path / "pack", held_out=0, steps=2))} == {None}


def test_a_loss_that_is_no_number_ends_it(pair: Pair, tmp_path: Path) -> None:
    training = begin(pair, tmp_path / "pack")
    with torch.no_grad():
        next(iter(training.parameters.values())).fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"the loss is nan at step 2: the training has diverged. Give a lower `lr` than 0\.01"):
        run(training)


def test_a_full_memory_is_said_with_what_to_do(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = begin(pair, tmp_path / "pack", held_out=0)

    def full() -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(training.model, "forward", lambda **_: full())
    with pytest.raises(ResourceError, match=r"out of memory .*smaller `micro_batch`, now 4, or `context`"):
        list(training.run())


@given(steps=st.integers(1, 300), warmup=st.floats(0, 0.9), floor=st.floats(0, 1))
def test_the_learning_rate_rises_then_falls_to_its_floor(steps: int, warmup: float, floor: float) -> None:
    spec = training_spec(steps=steps, warmup=warmup, floor=floor, lr=1.0)
    rates = [learning_rate(step, spec) for step in range(steps)]
    top = min(max(0, round(warmup * steps) - 1), steps - 1)
    assert all(rates[i] <= rates[i + 1] + 1e-12 for i in range(top))
    assert all(rates[i] >= rates[i + 1] - 1e-12 for i in range(max(top, round(warmup * steps)), steps - 1))
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert isclose(max(rates), 1.0)
    if steps - 1 - round(warmup * steps) > 0:
        assert isclose(rates[-1], floor, abs_tol=1e-9)


# -- checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(pair: Pair, tmp_path: Path) -> Path:
    training = begin(pair, tmp_path / "pack", steps=2)
    run(training)
    save_progress(training, _made(tmp_path / "states" / "a"))
    return tmp_path / "states" / "a"


def test_a_checkpoint_is_no_pickle(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["optimizer.safetensors", "progress.json", "weights.safetensors"]


@pytest.mark.parametrize("name", ["optimizer.safetensors", "weights.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content[:-9] + bytes(9))
    assert read_progress(saved) is None
    assert latest_progress([saved]) is None


def test_the_furthest_checkpoint_is_taken(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: Progress(saved / name, step, (), Crew(1, 1)) for name, step in (("a", 3), ("b", 12), ("c", 9))}
    monkeypatch.setattr("transplant_ray.organ.progress.read_progress", lambda folder: known.get(folder.name))
    found = latest_progress([saved / name for name in ("a", "b", "c", "damaged")])
    assert found is not None
    assert found.step == 12


def test_perplexities_are_of_losses() -> None:
    point = Point(3, 96, 1.5, 1e-3, 2.0)
    metrics = point_metrics(point)
    assert metrics["perplexity"] == exp(1.5)
    assert metrics["held_out_perplexity"] == exp(2.0)
    assert point_metrics(Point(0, 0, None, 1e-3)) == {"lr": 1e-3, "tokens": 0.0}
