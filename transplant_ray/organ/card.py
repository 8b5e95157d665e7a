"""Cards of an organ, and of a model that organs were put into: Markdown for people, front matter for hubs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from transplant_ray.models.checkpoint import CARD
from transplant_ray.organ.manifest import Manifest


def organ_card(organ: Manifest) -> str:
    return "\n".join(
        [
            _front(organ.licence, library=None),
            f"# Organ {organ.id}",
            "",
            f"Layers {organ.layers} of `{organ.source.model}`{_revision(organ.source.revision)}, counted from 0; it has "
            f"{organ.source.num_layers}. Family {organ.family}. This is no model by itself: it has neither embedding nor head.",
            "",
            _trained(organ),
            f"Licence of the model that it was cut out of: {organ.licence or 'not said'}.",
            "",
            "    transplant-ray organ insert --recipient MODEL --organ THIS_FOLDER --at POSITION --out OUT",
            "",
            "`organ.json` has its settings, the vocabulary that it has seen, and the hashes that it is held against.",
            "",
        ]
    )


def said_licence(folder: Path) -> str | None:
    """The licence in the front matter of a model's card, None where there is none."""
    try:
        found = re.match(r"---\n(.*?)\n---", (folder / CARD).read_text(encoding="utf-8"), re.DOTALL)
        said = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # a card is for people: whatever it holds is no error
        return None
    licence = said.get("license") if isinstance(said, dict) else None
    return licence if isinstance(licence, str) else None


def insertion_card(
    recipient: str,
    revision: str | None,
    licence: str | None,
    organs: Sequence[tuple[int, Manifest]],
    mode: str,
    layers: Sequence[str],
    notes: Sequence[str],
    licences: Sequence[str],
) -> str:
    """`organs` with their positions, `layers` of the new model by where each comes from, `licences`: files that came with organs.

    Hubs are told a licence where recipient and organs have the same one; of several, which holds for the whole is not ours to say.
    """
    agreed = licence if all(organ.licence == licence for _, organ in organs) else None
    return "\n".join(
        [
            _front(agreed, library="transformers"),
            f"# {recipient} with {len(organs)} organ{'s' if len(organs) > 1 else ''}",
            "",
            f"Layers of other models were put into `{recipient}`{_revision(revision)} (mode `{mode}`).",
            "Nothing was trained after that.",
            "",
            f"Licence of the recipient: {licence or 'not said'}.",
            *(f"Came with an organ: `{name}`." for name in licences),
            "",
            "## Organs",
            *(line for at, organ in organs for line in _organ_lines(at, organ, mode)),
            *(f"- Note: {note}." for note in notes),
            "",
            "## Layers",
            *(f"- {index}: {origin}" for index, origin in enumerate(layers)),
            "",
            "## Take them out again",
            "`transplant-ray organ remove THIS_FOLDER --out OUT` gives the recipient back, byte for byte.",
            "",
        ]
    )


def _organ_lines(at: int, organ: Manifest, mode: str) -> Iterator[str]:
    where = f"before layer {at}" if mode == "insert" else f"from layer {at} on, in place of what was there"
    yield f"- Organ `{organ.id}`, {where}: layers {organ.layers} of `{organ.source.model}`{_revision(organ.source.revision)}"
    yield f"  - {_trained(organ)}"
    yield f"  - licence: {organ.licence or 'not said'}"


def _trained(organ: Manifest) -> str:
    return (
        "It was trained after it was cut out: see `training` in `organ.json`."
        if organ.training
        else "Cut out as it was; not trained since."
    )


def _revision(revision: str | None) -> str:
    return f", revision `{revision}`" if revision else ""


def _front(licence: str | None, *, library: str | None) -> str:
    said = {"library_name": library, "license": licence, "tags": ["transplant-ray"]}
    return f"---\n{yaml.safe_dump({key: value for key, value in said.items() if value}, sort_keys=False)}---"
