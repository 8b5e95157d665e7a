"""How far source and target are apart, module by module, and which share of that a variant moves: from the files alone.

A coefficient scales a row of the affine map [W b], so the bias counts as one more column of its row; then what `moved` says is
exactly ‖θ(c) − θ(0)‖ ÷ ‖θ(1) − θ(0)‖ over all that can be transplanted (in narrow dtypes up to the rounding of a blend).

Letters: O output channels, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from transplant_ray.errors import VariantError
from transplant_ray.graft.variant import Variant
from transplant_ray.models.catalogue import Module
from transplant_ray.models.compare import Comparison, Pair
from transplant_ray.models.header import DTYPES
from transplant_ray.models.loading import load_tensors
from transplant_ray.tables import read_rows, write_rows

Norms = Mapping[str, NDArray[np.float64]]
"""Module → (O,) norm of every output channel's row of [Ws − Wt, bs − bt]."""

SCHEMA = pa.schema(
    [
        ("module", pa.string()),
        ("layer", pa.int32()),
        ("kind", pa.string()),
        ("projection", pa.string()),
        ("num_parameters", pa.int64()),
        ("delta_norm", pa.float64()),
        ("channel_norms", pa.list_(pa.float64())),
    ]
)
"""modules.parquet. `delta_norm` is the norm of `channel_norms`."""


def delta_norms(comparison: Comparison) -> Norms:
    """For every compatible module, in their order: the norm of each output channel's row of [Ws − Wt, bs − bt], float64, (O,).

    The source is rounded to the target's dtype first, as an export rounds it. No model is loaded: the weights of one module are in
    memory at a time. NumericsError where a weight is not finite.
    """
    return {name: _channel_norms(comparison, pair) for name, pair in comparison.pairs.items()}


def moved(variant: Variant, norms: Norms) -> float:
    """Share of ‖ΔW‖ that a variant moves, √(Σ c²‖row‖²) ÷ √(Σ ‖row‖²): 0 for the target, 1 for all swapped.

    0 where source and target are equal in every module, for then nothing moves. VariantError for a module that has no norms, or
    another number of channels.
    """
    total = sum(float(row_O @ row_O) for row_O in norms.values())
    squares = (float(np.square(_scaled(variant, name, norms)).sum()) for name in variant.coefficients)
    return float(np.sqrt(sum(squares) / total)) if total else 0.0


def alpha_of_equal_norm(variant: Variant, norms: Norms) -> float:
    """The one coefficient that, given to all compatible modules, moves as much of ‖ΔW‖ as `variant`.

    It is `moved(variant, norms)` itself: a uniform α moves √(Σ α²‖row‖²) ÷ √(Σ ‖row‖²) = α.
    """
    return moved(variant, norms)


def write_norms(path: Path, norms: Norms, modules: Iterable[Module]) -> None:
    """modules.parquet: one row per module, in the order of `modules`."""
    write_rows(path, [_row(module, norms[module.name]) for module in modules], SCHEMA)


def read_norms(path: Path) -> Norms:
    """What `write_norms` kept. RunError where the file cannot be read."""
    return {str(row["module"]): np.asarray(row["channel_norms"], dtype=np.float64) for row in read_rows(path)}


def _channel_norms(comparison: Comparison, pair: Pair) -> NDArray[np.float64]:
    ours, theirs = pair.target, pair.source
    delta = _delta(comparison, ours.disk_weight, theirs.disk_weight)
    squares_O = delta.square().sum(dim=0 if ours.transposed else 1)
    if ours.disk_bias and theirs.disk_bias:
        squares_O += _delta(comparison, ours.disk_bias, theirs.disk_bias).square()
    norms_O: NDArray[np.float64] = squares_O.sqrt().numpy()
    return norms_O


def _delta(comparison: Comparison, ours: str, theirs: str) -> torch.Tensor:
    """Source − target of one tensor in float64, in place: of the largest there is one such copy beside the two that are stored."""
    stored = DTYPES[comparison.target.tensors[ours].dtype]
    delta = load_tensors(comparison.source, [theirs], stored)[theirs].double()
    return delta.sub_(load_tensors(comparison.target, [ours])[ours])


def _scaled(variant: Variant, name: str, norms: Norms) -> NDArray[np.float64]:
    if name not in norms:
        raise VariantError(f"variant: {name} is not among the {len(norms)} modules with a norm. Compare the same pair of models.")
    coefficient, norms_O = np.asarray(variant.coefficients[name], dtype=np.float64), norms[name]
    if coefficient.ndim and coefficient.shape != norms_O.shape:
        raise VariantError(f"variant: {name} has {len(coefficient)} coefficients, expected 1 or its {len(norms_O)} channels.")
    scaled: NDArray[np.float64] = coefficient * norms_O
    return scaled


def _row(module: Module, norms_O: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "module": module.name,
        "layer": module.layer,
        "kind": module.role.kind,
        "projection": module.role.projection,
        "num_parameters": module.num_parameters,
        "delta_norm": float(np.linalg.norm(norms_O)),
        "channel_norms": norms_O,
    }
