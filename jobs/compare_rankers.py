"""Is a ranker better than what needs no ranking? Areas under Recovery over K, from finished sweeps.

    transplant-ray sweep RECIPE 'rank.by=[lae,attribution]' sweep.k=[1,2,4,8,12,16,20,24] 'sweep.kind=[all]' \
        'sweep.controls={random: 20, alpha: [0.0357, 0.0714, 0.1429, 0.2857, 0.4286, 0.5714, 0.7143, 0.8571]}'
    python jobs/compare_rankers.py runs/NAME [runs/OTHER ...] [--ranker attribution]

The area is that of the piecewise linear curve from (0, 0) over the K of the grid, divided by the largest K: the mean Recovery on
the way. The uniform merge stands at K where its alpha is nearest to K ÷ the number of modules. Intervals are 95 % paired percentile
bootstraps over the select examples (10,000 resamples); the best of the alternatives is looked for in every resample again.

Shapes: R resamples, E examples, V variants, K points of a curve.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from transplant_ray.evaluate.significance import RESAMPLES

Floats = NDArray[np.float64]
ORIGIN = "44136fa355"
NEAR = 0.02
"""A merge stands for K modules where its alpha is as near as this to their share."""


class Sweep:
    """Accuracies of the variants of one run on resamples of its select examples; the first is the whole set."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.rows = pd.read_parquet(folder / "results.parquet").query("split == 'select'")
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
            if distance.min() > NEAR:
                raise SystemExit(
                    f"no uniform merge near alpha {k / self.num_modules:.4f} for K = {k}: add it to sweep.controls.alpha"
                )
            points[k] = self.recovery(rows.loc[distance.idxmin(), "variant"])
        return points


def shown(area_R: Floats) -> str:
    low, high = np.quantile(area_R[1:], (0.025, 0.975))
    return f"{area_R[0]:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--ranker", default="attribution")
    arguments = parser.parse_args()
    differences = []
    for seed, folder in enumerate(arguments.runs):
        sweep = Sweep(folder, seed)
        areas = sweep.curves(arguments.ranker)
        best_R = np.max([area for name, area in areas.items() if name != arguments.ranker], axis=0)
        differences.append(areas[arguments.ranker] - best_R)
        print(f"{folder.name} (n = {sweep.num_examples})")
        for name, area in areas.items():
            print(f"  {name:14} {shown(area)}")
        print(f"  {arguments.ranker} − best of the others: {shown(differences[-1])}")
    if len(differences) > 1:
        print(f"mean over {len(differences)} runs: {shown(np.mean(differences, axis=0))}")


if __name__ == "__main__":
    main()
