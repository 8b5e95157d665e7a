"""Is a ranker better than what needs no ranking, and what do gates keep? From finished sweeps, as `study_pairs.py` runs them.

    python jobs/compare_rankers.py studies/* [--ranker attribution]

The area is that of the piecewise linear curve from (0, 0) over the K of the grid, divided by the largest K: the mean Recovery on
the way. The uniform merge stands at K where its alpha is nearest to K ÷ the number of modules. Intervals are 95 % paired percentile
bootstraps over the select examples (10,000 resamples); the best of the alternatives is looked for in every resample again. Over
runs: Student's interval, of all runs, and of the means of the pairs (`PAIR.seedN` are seeds of one pair).

Where the sweep had guards: the largest share of a guard's accuracy that a variant with Recovery of 0.5 or more keeps, on select.
It is the best of all variants of a way, so a way with many of them is flattered: random sets, above all.

Shapes: R resamples, E examples, V variants, K points of a curve.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from transplant_ray.evaluate.metrics import mean_interval
from transplant_ray.evaluate.significance import RESAMPLES

Floats = NDArray[np.float64]
ORIGIN = "44136fa355"
ENOUGH = 0.5
"""Recovery, from which on a guard's share counts."""
NEAR = 0.02
"""A merge stands for K modules where its alpha is as near as this to their share."""


class Sweep:
    """Accuracies of the variants of one run on resamples of its select examples; the first is the whole set."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.rows = pd.read_parquet(folder / "results.parquet").query("split == 'select'")
        self.guards = pd.read_parquet(folder / "guards.parquet").query("split == 'select'")
        if self.rows["accuracy"].isna().all():
            raise SystemExit(f"{folder}: its task has losses, and areas are of accuracies")
        outcomes = pd.read_parquet(folder / "outcomes" / "select.parquet").drop_duplicates(["variant", "example"])
        right_VE = outcomes.pivot(index="variant", columns="example", values="correct").dropna().astype(float)
        num_examples = right_VE.shape[1]
        drawn_RE = np.random.default_rng(seed).multinomial(num_examples, np.full(num_examples, 1 / num_examples), size=RESAMPLES)
        weight_RE = np.vstack([np.ones(num_examples), drawn_RE]) / num_examples
        self.accuracy = {str(name): weight_RE @ right_E for name, right_E in zip(right_VE.index, right_VE.to_numpy(), strict=True)}
        self.num_examples = num_examples
        self.num_modules = int(self.rows.query("role == 'all'")["num_modules"].iloc[0])

    def recovery(self, variant: str) -> Floats:
        target, source = self.accuracy[ORIGIN], self.accuracy["source"]
        return (self.accuracy[variant] - target) / (source - target)

    def area(self, points: dict[int, Floats]) -> Floats:
        """(R,) mean Recovery from K = 0 to the largest K."""
        ks = [0, *sorted(points)]
        curve_KR = np.stack([np.zeros_like(next(iter(points.values()))), *(points[k] for k in sorted(points))])
        return np.trapezoid(curve_KR, ks, axis=0) / ks[-1]

    def curves(self, ranker: str) -> dict[str, Floats]:
        """Name → area, of the ranker and of what it is held against."""
        rows = self.rows.query("kind == 'all' and channels.isna() and penalty.isna()")
        trials, controls = rows.query("role == 'trial' and alpha == 1"), rows.query("role == 'control'")
        ks = sorted(trials["k"].astype(int).unique())
        areas = {name: self.area(self._top_k(trials.query("ranker == @name"))) for name in (ranker, "lae")}
        areas["depth"] = self.area(self._top_k(controls.query("ranker == 'depth'")))
        areas["random, mean"] = self.area(self._means(controls.query("ranker == 'random'")))
        areas["uniform alpha"] = self.area(self._merges(controls.query("ranker == 'uniform'"), ks))
        return areas

    def _top_k(self, rows: pd.DataFrame) -> dict[int, Floats]:
        return {int(row.k): self.recovery(row.variant) for row in rows.itertuples()}

    def _means(self, rows: pd.DataFrame) -> dict[int, Floats]:
        by_k: dict[int, list[Floats]] = defaultdict(list)
        for row in rows.itertuples():
            by_k[int(row.k)].append(self.recovery(row.variant))
        return {k: np.mean(found, axis=0) for k, found in by_k.items()}

    def _merges(self, rows: pd.DataFrame, ks: list[int]) -> dict[int, Floats]:
        points = {}
        for k in ks:
            distance = (rows["alpha"] - k / self.num_modules).abs()
            if not distance.min() <= NEAR:  # where there are no merges, there is no least distance either
                raise SystemExit(
                    f"no uniform merge near alpha {k / self.num_modules:.4f} for K = {k}: add it to sweep.controls.alpha"
                )
            points[k] = self.recovery(rows.loc[distance.idxmin(), "variant"])
        return points

    def kept(self) -> dict[str, dict[str, float | None]]:
        """Guard → way → the largest share kept at Recovery ≥ ENOUGH; None where no variant of that way reaches it."""
        ways = {"gates": "ranker.str.startswith('gates', na=False)", "uniform alpha": "ranker == 'uniform'"}
        ways |= {name: f"ranker == '{name}'" for name in ("attribution", "lae", "depth", "random")}
        enough = {name for name in self.accuracy if self.recovery(name)[0] >= ENOUGH}
        return {
            str(guard): {way: self._best_share(shares, self.rows.query(chosen), enough) for way, chosen in ways.items()}
            for guard, shares in self.guards.groupby("guard")
        }

    def _best_share(self, shares: pd.DataFrame, rows: pd.DataFrame, enough: set[str]) -> float | None:
        found = shares[shares["variant"].isin(enough & set(rows["variant"]))]["share"]
        return None if found.empty else float(found.max())


def over_runs(values: Sequence[float]) -> str:
    """Mean and Student's 95 % interval."""
    low, high = mean_interval(values) or (nan, nan)
    return f"{fmean(values):+.3f} [{low:+.3f}, {high:+.3f}], n = {len(values)}"


def print_areas(sweeps: Mapping[str, Sweep], ranker: str) -> None:
    differences: dict[str, Floats] = {}
    for name, sweep in sweeps.items():
        areas = sweep.curves(ranker)
        best_R = np.max([area for other, area in areas.items() if other != ranker], axis=0)
        differences[name] = areas[ranker] - best_R
        print(f"{name} (n = {sweep.num_examples})")
        for other, area in areas.items():
            print(f"  {other:14} {shown(area)}")
        print(f"  {ranker} − best of the others: {shown(differences[name])}")
    if len(differences) > 1:
        pairs = defaultdict(list)
        for name, difference in differences.items():
            pairs[name.split(".seed")[0]].append(float(difference[0]))
        print(f"over examples: {shown(np.mean(list(differences.values()), axis=0))}")
        print(f"over runs: {over_runs([value for values in pairs.values() for value in values])}")
        for pair, values in pairs.items():
            print(f"  {pair:18} {', '.join(f'{value:+.3f}' for value in values)}")
        print(f"over pairs: {over_runs([fmean(values) for values in pairs.values()])}")


def print_kept(sweeps: Mapping[str, Sweep]) -> None:
    """A line per run and guard, and the means over the runs in which gates and attribution both get there."""
    found = {(name, guard): ways for name, sweep in sweeps.items() for guard, ways in sweep.kept().items()}
    if not found:
        return
    held_out = {guard for sweep in sweeps.values() for guard in sweep.guards[sweep.guards["held_out"]]["guard"]}
    print(f"\nlargest share of a guard kept at Recovery ≥ {ENOUGH}, on select")
    for (name, guard), ways in found.items():
        told = "  ".join(f"{way} {'–' if share is None else format(share, '.2f')}" for way, share in ways.items())
        print(f"  {name:26} {guard + (' (held out)' if guard in held_out else ''):22} {told}")
    for guard in sorted({guard for _, guard in found}):
        mine = [(ways["gates"], ways["attribution"]) for (_, name), ways in found.items() if name == guard]
        both = [gates - attribution for gates, attribution in mine if gates is not None and attribution is not None]
        if len(both) > 1:
            print(f"gates − attribution, {guard}: {over_runs(both)}")


def shown(area_R: Floats) -> str:
    low, high = np.quantile(area_R[1:], (0.025, 0.975))
    return f"{area_R[0]:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--ranker", default="attribution")
    arguments = parser.parse_args()
    sweeps = {folder.name: Sweep(folder, seed) for seed, folder in enumerate(arguments.runs)}
    print_areas(sweeps, arguments.ranker)
    print_kept(sweeps)


if __name__ == "__main__":
    main()
