"""A variant: a point in coefficient space, and the weight that it gives a module.

W(c) = Wt + diag(c)·(Ws − Wt)        c = 0 the target's weight, c = 1 the source's, between them a blend
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import torch

from transplant_ray.errors import VariantError
from transplant_ray.models.catalogue import Module

Coefficient = float | tuple[float, ...]
"""One number for a module, or one per output channel."""


LARGEST = 1e3
"""No coefficient is as large, extrapolated or not."""


@dataclass(frozen=True)
class Variant:
    """A mapping module name → coefficient in [0, 1]; absent modules are 0. The empty variant is the target."""

    coefficients: Mapping[str, Coefficient]
    extrapolate: bool = field(default=False, compare=False)
    """Whether coefficients outside [0, 1] are meant."""

    def __post_init__(self) -> None:
        plain = {name: _plain(c) for name, c in sorted(self.coefficients.items())}
        nonzero = {name: c for name, c in plain.items() if not (isinstance(c, float) and c == 0)}
        object.__setattr__(self, "coefficients", MappingProxyType(nonzero))

    @property
    def id(self) -> str:
        """Content hash: equal variants have equal ids."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def to_json(self) -> dict[str, Any]:
        return {name: list(c) if isinstance(c, tuple) else c for name, c in self.coefficients.items()}

    @classmethod
    def from_json(cls, value: Any) -> Variant:
        if not isinstance(value, Mapping):
            raise VariantError(f"variant: found {type(value).__name__}, expected a mapping module → coefficient.")
        return cls({str(name): tuple(c) if isinstance(c, list) else c for name, c in value.items()})

    @classmethod
    def uniform(cls, names: Iterable[str], coefficient: float = 1.0, *, extrapolate: bool = False) -> Variant:
        return cls(dict.fromkeys(names, coefficient), extrapolate)

    def __getstate__(self) -> dict[str, Any]:  # a mapping proxy does not pickle
        return {"coefficients": dict(self.coefficients), "extrapolate": self.extrapolate}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "coefficients", MappingProxyType(state["coefficients"]))
        object.__setattr__(self, "extrapolate", state["extrapolate"])

    def __hash__(self) -> int:
        return hash(self.id)


def _plain(coefficient: Any) -> Any:
    """Numbers as floats, so that 1 and 1.0 are one variant; what is no coefficient stays, for `check_variant` to name."""
    if isinstance(coefficient, tuple):
        return tuple(map(_plain, coefficient))
    number = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
    return float(coefficient) + 0.0 if number and abs(coefficient) < LARGEST else coefficient  # −0.0 + 0.0 is 0.0


VARIANT_SCHEMA = pa.schema([("variant", pa.string()), ("module", pa.string()), ("coefficients", pa.list_(pa.float64()))])


def variant_rows(variants: Iterable[Variant]) -> Iterator[dict[str, Any]]:
    """Rows of variants.parquet: a module of a variant with its coefficient, or with one for every channel."""
    for variant in variants:
        for name, c in variant.coefficients.items():
            yield {"variant": variant.id, "module": name, "coefficients": list(c) if isinstance(c, tuple) else [c]}


def read_variant(rows: Iterable[Mapping[str, Any]], id: str) -> Variant:
    """Inverse of `variant_rows`, for one of them; the origin, which has no rows, where none is its."""
    mine = {str(row["module"]): row["coefficients"] for row in rows if row["variant"] == id}
    return Variant({name: c[0] if len(c) == 1 else tuple(c) for name, c in mine.items()}, extrapolate=True)


ORIGIN = Variant({})
"""The target itself."""


def check_variant(variant: Variant, modules: Mapping[str, Module]) -> Variant:
    """VariantError for modules that the pair lacks, the wrong number of channels, or coefficients outside [0, 1].

    A variant that may `extrapolate` has any coefficient below 1000.
    """
    for name, coefficient in variant.coefficients.items():
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise VariantError(f"variant: {name} is not a compatible module of this pair.{hint}")
        values = coefficient if isinstance(coefficient, tuple) else (coefficient,)
        low, high = (-LARGEST, LARGEST) if variant.extrapolate else (0, 1)
        wrong = [c for c in values if isinstance(c, bool) or not isinstance(c, int | float) or not low <= c <= high]
        if wrong:
            hint = "" if variant.extrapolate else " (or `sweep.extrapolate: true`)"
            raise VariantError(f"variant: {name} has coefficient {wrong[0]!r}; expected a number in [{low:g}, {high:g}]{hint}.")
        channels = modules[name].num_channels
        if isinstance(coefficient, tuple) and len(coefficient) != channels:
            raise VariantError(f"variant: {name} has {len(coefficient)} coefficients, expected 1 or its {channels} channels.")
    return variant


def blend(target: torch.Tensor, source: torch.Tensor, coefficient: Coefficient, *, transposed: bool = False) -> torch.Tensor:
    """W(c) of a weight or a bias, in the target's dtype. c = 0 and c = 1 give back `target` and `source` themselves.

    Between them `torch.lerp`, in float32 for narrower dtypes: `t + c·(s − t)` is not exact at the ends. One coefficient per channel
    runs over the output dimension: the first, or the last where `transposed` and in a bias.
    """
    if coefficient == 0:
        return target
    if coefficient == 1:
        return source.to(target.dtype)
    wide = torch.promote_types(target.dtype, torch.float32)
    weight = torch.tensor(coefficient, dtype=wide, device=target.device)
    if weight.dim() == 1 and target.dim() == 2 and not transposed:
        weight = weight[:, None]
    return torch.lerp(target.to(wide), source.to(device=target.device, dtype=wide), weight).to(target.dtype)
