"""Cards of an organ, and of a model that organs were put into: Markdown for people, front matter for hubs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import yaml

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


def insertion_card(
    recipient: str, organs: Sequence[tuple[int, Manifest]], mode: str, layers: Sequence[str], notes: Sequence[str]
) -> str:
    """`organs` with their positions, `layers` of the new model by where each comes from."""
    return "\n".join(
        [
            _front(None, library="transformers"),
            f"# {recipient} with {len(organs)} organ{'s' if len(organs) > 1 else ''}",
            "",
            f"Layers of other models were put into `{recipient}` (mode `{mode}`); nothing was trained after that.",
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
