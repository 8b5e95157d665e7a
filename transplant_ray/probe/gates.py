"""Gates: coefficients of rows or modules, fitted by projected gradient to task loss + λ · guard loss, then rounded to 0 or 1.

No weight is trained, but as many numbers are fitted as there are rows: `Found.num_coefficients` says how many. All start half way
between the target and the source, where one gradient says most about the whole path and no side has an advantage when it is
rounded (docs/decisions/0016). Nothing is drawn at random, so a fit repeats.

Shapes: O output channels of a module.
"""

from __future__ import annotations

import time

import torch

from transplant_ray.graft.variant import Coefficient, Variant
from transplant_ray.probe.measured import Cost
from transplant_ray.probe.search import Found, Gates, Search, check_search, gradients, losses, step_share
from transplant_ray.recipe import GatesSpec

START = 0.5
THRESHOLD = 0.5
"""A gate is open above it. One that stays on it, for its row makes no difference, leaves the target as it is."""


def fit_gates(search: Search, spec: GatesSpec) -> list[Found]:
    """One result for each λ of the grid, in its order; each starts anew, so that it does not depend on the others.

    RecipeError where a λ or a kind has no effect, DataError for a guard without examples, NumericsError where a loss
    or a gradient is not finite.
    """
    check_search(search, spec.penalty, "search.gates")
    names = search.modules(spec.kind, "search.gates.kind")
    return [_fit_one(search, names, spec, penalty) for penalty in spec.penalty]


def _fit_one(search: Search, names: tuple[str, ...], spec: GatesSpec, penalty: float) -> Found:
    start = time.perf_counter()
    gates = descend(search, start_gates(search, names, spec.unit), spec, penalty)
    rounded = round_gates(gates)
    before, after = losses(search, [as_variant(gates), rounded])
    forwards, backwards = step_share(search, penalty)
    cost = Cost(spec.steps * forwards + 2, spec.steps * backwards, seconds=time.perf_counter() - start)
    return Found.of(rounded, penalty, before, after, sum(gate.numel() for gate in gates.values()), cost)


def start_gates(search: Search, names: tuple[str, ...], unit: str) -> dict[str, torch.Tensor]:
    """All at the start, in float32 or wider, beside their weights."""
    gates = {}
    for name in names:
        graft = search.bench.engine.pair.grafts[name]
        weight, shape = graft.target.weight, (graft.module.num_channels,) if unit == "row" else ()
        gates[name] = torch.full(shape, START, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    return gates


def descend(search: Search, gates: Gates, spec: GatesSpec, penalty: float) -> Gates:
    """These gates after `spec.steps` steps of Adam, each projected back onto [0, 1]. They are changed in place."""
    for gate in gates.values():
        gate.requires_grad_()
    adam = torch.optim.Adam(gates.values(), lr=spec.learning_rate)
    for _ in range(spec.steps):
        for name, gradient in gradients(search, gates, penalty).items():
            gates[name].grad = gradient
        adam.step()
        with torch.no_grad():
            for gate in gates.values():
                gate.clamp_(0, 1)
    return {name: gate.detach() for name, gate in gates.items()}


def round_gates(gates: Gates) -> Variant:
    return as_variant({name: (gate > THRESHOLD).to(gate.dtype) for name, gate in gates.items()})


def as_variant(gates: Gates) -> Variant:
    """A module whose rows are all the same has one coefficient."""
    return Variant({name: _coefficient(gate) for name, gate in gates.items()})


def _coefficient(gate: torch.Tensor) -> Coefficient:
    values = gate.flatten().tolist()
    return values[0] if len(set(values)) == 1 else tuple(values)
