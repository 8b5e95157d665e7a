"""A training on one rank: AdamW on blocks of tokens, the same to the bit however often it is stopped.

Order, learning rate and dropout of a step follow from the settings and the number of the step alone, so that a checkpoint is
weights, moments and that number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import cos, isfinite, pi
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from transplant_ray.errors import NumericsError, ResourceError
from transplant_ray.organ.losses import block_losses
from transplant_ray.organ.pack import Blocks, Order, Pack
from transplant_ray.recipe import TrainingSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rank:
    """One of the workers."""

    number: int = 0
    of: int = 1
    device: torch.device = CPU

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        if self.of > 1:
            distributed.all_reduce(tensor)
        return tensor


@dataclass(frozen=True)
class Point:
    """Of the curves; losses are in nats a token."""

    step: int
    tokens: int
    """Read so far."""
    loss: float | None
    """Mean over the steps since the last point; None before the first."""
    lr: float
    held_out: float | None = None
    """Of text that is not trained on, where it was measured."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Training:
    """A model, of which whatever has gradients is trained; its optimizer, and how far it is."""

    def __init__(self, model: nn.Module, pack: Pack, spec: TrainingSpec, rank: Rank = Rank()) -> None:  # frozen
        self.pack, self.spec, self.rank = pack, spec, rank
        self.model = model.to(rank.device).train()
        self.parameters = trained_parameters(self.model)
        self.optimizer = make_optimizer(self.parameters, spec, rank.device)
        self.copies = _with_others(self.model, rank)
        self.order = Order(pack.train.num, spec.seed)
        self.step = 0
        self.curve: list[Point] = []

    @property
    def done(self) -> bool:
        return self.step >= self.spec.num_steps

    def run(self) -> Iterator[Point]:
        """To the end. A point every `report_every` steps; with the held-out loss at the start and where a checkpoint is due."""
        if self.step == 0:
            yield self._point(None, self.held_out_loss())
        sum_of_losses, since = torch.zeros((), device=self.rank.device), self.step
        while not self.done:
            sum_of_losses += self._step()
            due = self.done or self.step % self.spec.pause == 0
            if due or self.step % self.spec.report_every == 0:
                loss = float(self.rank.total(sum_of_losses)) / (self.rank.of * (self.step - since))
                held_out = self.held_out_loss() if due else None
                self._check_finite(loss)
                self._check_finite(held_out)
                yield self._point(loss, held_out)
                sum_of_losses, since = torch.zeros_like(sum_of_losses), self.step

    def is_due(self, point: Point) -> bool:
        """Whether a checkpoint belongs to the point."""
        return point.step > 0 and (point.step == self.spec.num_steps or point.step % self.spec.pause == 0)

    def held_out_loss(self) -> float | None:
        """Mean token loss of the held-out text; None where that is shorter than a context."""
        blocks, spec = self.pack.held_out, self.spec
        mine = list(range(min(blocks.num, spec.held_out_contexts)))[self.rank.number :: self.rank.of]
        if not min(blocks.num, spec.held_out_contexts):
            return None
        self.model.eval()
        losses = list(block_losses(self.model, blocks, mine, self._rows, spec.dtype))
        sums = torch.tensor([sum(losses), len(losses)], dtype=torch.float64, device=self.rank.device)
        self.model.train()
        total, number = self.rank.total(sums).tolist()
        return float(total / number)

    def moments(self) -> dict[str, torch.Tensor]:
        """AdamW's two per parameter: `exp_avg.NAME` and `exp_avg_sq.NAME`."""
        states = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        return {f"{moment}.{name}": state[moment] for name, state in states.items() for moment in MOMENTS}

    def restore(
        self, step: int, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], curve: list[Point]
    ) -> None:
        """Go on after `step`."""
        self.step, self.curve = step, list(curve)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        names = [name for group in self.optimizer.param_groups for name in group["names"]]
        state = {
            index: {"step": torch.tensor(float(step)), **{moment: moments[f"{moment}.{name}"] for moment in MOMENTS}}
            for index, name in enumerate(names)
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    @property
    def _rows(self) -> int:
        """Blocks that a rank reads at a time."""
        return self.spec.micro_batch or self.spec.batch // self.rank.of

    def _step(self) -> torch.Tensor:
        """One step of the optimizer; the loss of this rank's share of the batch."""
        spec, parts = self.spec, self.spec.batch // (self._rows * self.rank.of)
        _seed_step(spec.seed, self.step, self.rank.number)
        sum_of_losses = torch.zeros((), device=self.rank.device)
        try:
            for part in range(parts):
                first = self.step * spec.batch + (part * self.rank.of + self.rank.number) * self._rows
                with self._alone() if part < parts - 1 else nullcontext():
                    loss = self._loss(self.copies, self.pack.train, self.order.blocks(first, first + self._rows)) / parts
                    loss.backward()  # type: ignore[no-untyped-call]
                sum_of_losses += loss.detach()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory ({error}). Give a smaller `micro_batch`, now {self._rows}, or `context`."
            ) from error
        nn.utils.clip_grad_norm_(self.parameters.values(), spec.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, spec)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return sum_of_losses

    def _loss(self, model: nn.Module, blocks: Blocks, indices: list[int]) -> torch.Tensor:
        ids_BT = blocks.read(indices).to(self.rank.device, non_blocking=True)
        with torch.autocast(self.rank.device.type, torch.bfloat16, enabled=self.spec.dtype == "bfloat16"):
            return cast(torch.Tensor, model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss)

    def _alone(self) -> AbstractContextManager[Any]:
        """Gradients are exchanged once a step."""
        return self.copies.no_sync() if isinstance(self.copies, DistributedDataParallel) else nullcontext()

    def _point(self, loss: float | None, held_out: float | None) -> Point:
        tokens = self.step * self.spec.batch * self.spec.context
        point = Point(self.step, tokens, loss, learning_rate(max(0, self.step - 1), self.spec), held_out)
        self.curve.append(point)
        return point

    def _check_finite(self, loss: float | None) -> None:
        if loss is not None and not isfinite(loss):
            raise NumericsError(
                f"the loss is {loss} at step {self.step}: the training has diverged. Give a lower `lr` than {self.spec.lr:g}."
            )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By their names in the model; of the wrapper of an organ, those of its file."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def learning_rate(step: int, spec: TrainingSpec) -> float:
    """Of a step, counted from 0: a straight rise over the warmup, then half a cosine down to `floor`."""
    warmup = round(spec.warmup * spec.num_steps)
    if step < warmup:
        return spec.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, spec.num_steps - 1 - warmup)
    return spec.lr * (spec.floor + (1 - spec.floor) * (1 + cos(pi * min(1.0, share))) / 2)


def make_optimizer(parameters: Mapping[str, nn.Parameter], spec: TrainingSpec, device: torch.device) -> torch.optim.AdamW:
    """Decay is of what has two dimensions or more, as is usual."""
    groups: list[dict[str, Any]] = []
    for decays, decay in ((True, spec.weight_decay), (False, 0.0)):
        if names := [name for name, parameter in parameters.items() if (parameter.dim() > 1) == decays]:
            groups.append({"params": [parameters[name] for name in names], "names": names, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, fused=device.type == "cuda")


def _with_others(model: nn.Module, rank: Rank) -> nn.Module:
    if rank.of == 1:
        return model
    devices = [rank.device] if rank.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout, where the family has it, is drawn anew for every step and rank."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "big") >> 1)
