"""The model card of an exported variant, as Markdown for people and front matter for hubs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from transplant_ray.graft.export import file_hashes
from transplant_ray.graft.variant import Variant
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.compare import Comparison


def write_card(title: str, comparison: Comparison, variant: Variant, metrics: Sequence[Mapping[str, str]]) -> str:
    """Markdown. `metrics` are rows of one table, all with the same keys; it may be empty."""
    front = yaml.safe_dump({"library_name": "transformers", "tags": ["transplant-ray"]}, sort_keys=False)
    return "\n".join(
        [
            f"---\n{front}---",
            f"# {title}",
            "",
            "Weights of the source model were copied into the target model, module by module; nothing was trained.",
            f"Variant `{variant.id}`: {len(variant.coefficients)} of {len(comparison.pairs)} compatible modules.",
            "",
            "## Models",
            *(_model("Source", comparison.source) + _model("Target", comparison.target)),
            "",
            "## Measured",
            *(_table(metrics) if metrics else ["Not measured: this variant was exported without an evaluation."]),
            "",
            "## Modules",
            *_table([{"module": name, "coefficient": _shown(c)} for name, c in variant.coefficients.items()]),
            "",
            "## Make it again",
            "`variant.json` beside this card names both models and every coefficient.",
            "",
        ]
    )


def _model(role: str, checkpoint: Checkpoint) -> list[str]:
    revision = f", revision `{checkpoint.revision}`" if checkpoint.revision else ""
    hashes = [f"  - `{file}` sha256 `{digest}`" for file, digest in file_hashes(checkpoint.fetch(), checkpoint).items()]
    return [f"- {role}: `{checkpoint.model}`{revision}", *hashes]


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    if not rows:
        return ["None: this is the target."]
    head = list(rows[0])
    return [_line(head), _line(["---"] * len(head)), *(_line([row[key] for key in head]) for row in rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(coefficient: object) -> str:
    return f"{len(coefficient)} channels" if isinstance(coefficient, tuple) else f"{coefficient:g}"
