"""The text of the organ demo: general text that Python brings along, and domain text, GSM8K's questions where they are at hand.

    general.jsonl      text, kind     documentation and source of the standard library
    domain.jsonl       question       the generated stand-in; or a link to GSM8K, which is read where it lies
    text.json          what of them there is, and their hashes

Both are cut into shares by the hash of what a document says: what is measured is never trained on, by anybody.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transplant_ray
from transplant_ray.errors import DataError, RunError
from transplant_ray.files import sha256_file, whole_folder, write_json
from transplant_ray.recipe import CorpusSpec, DemoSpec
from transplant_ray.zoo.library_text import library_documents
from transplant_ray.zoo.word_problems import rows, word_problems

GENERAL, DOMAIN, RECORD = "general.jsonl", "domain.jsonl", "text.json"
GSM8K = Path("shared", "data", "gsm8k", "train.jsonl")
"""Beside the folder of the repository, or beside the working directory."""
MEASURED = {"general": 0.1, "domain": 0.2}
"""Share of the documents that perplexity is measured on."""


@dataclass(frozen=True)
class DemoText:
    folder: Path
    record: Mapping[str, Any]

    @property
    def stand_in(self) -> bool:
        return bool(self.record["domain"]["stand_in"])

    @property
    def domain_is(self) -> str:
        """In words, for whoever reads a number."""
        return f"{self.record['domain']['documents']:,} {self.record['domain']['what']}"

    def trained_on(self, which: str) -> dict[str, Any]:
        """A corpus of `general` or `domain`, as settings of a CorpusSpec."""
        return self._corpus(which, MEASURED[which], 1.0)

    def measured_on(self, which: str) -> dict[str, Any]:
        return self._corpus(which, 0.0, MEASURED[which])

    def _corpus(self, which: str, low: float, high: float) -> dict[str, Any]:
        said = self.record[which]
        spec = CorpusSpec(data=(said["file"],), text=said["text"], share=(low, high))
        return spec.model_dump(mode="json")


def find_gsm8k(given: str | Path | None = None) -> Path | None:
    """GSM8K's training questions: the file that was given (or the one in a folder), or one beside the repository; None where there
    is none, DataError where what was given is not there."""
    if given is not None:
        path = Path(os.path.expanduser(given))
        path = path / "train.jsonl" if path.is_dir() else path
        if not path.is_file():
            raise DataError(
                f"{given}: no such file, or no `train.jsonl` in it. Give GSM8K's train.jsonl, or nothing: then a stand-in is made."
            )
        return path.absolute()
    checkout = Path(transplant_ray.__file__).parents[1]
    places = (checkout.parent / GSM8K, Path.cwd().parent / GSM8K)
    return next((path.absolute() for path in places if path.is_file()), None)


def make_text(spec: DemoSpec, folder: Path, domain: Path | None) -> DemoText:
    """Write the text into `folder`, or take what is there. `domain` None makes the stand-in. RunError where other text is there."""
    if not folder.exists():
        _write_text(spec, folder, domain)
    text = read_text(folder)
    asked = _asked(spec, domain)
    if text.record["asked"] != asked:
        raise RunError(
            f"{folder}: holds other text ({text.record['asked']}; expected {asked}). Give the same settings, or another `--out`."
        )
    return text


def read_text(folder: Path) -> DemoText:
    try:
        return DemoText(folder, json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: no whole text of a demo ({error}). Remove it; it is made again.") from error


def _asked(spec: DemoSpec, domain: Path | None) -> dict[str, Any]:
    """What decides the text."""
    stand_in = {"problems": spec.problems, "seed": spec.seed} if domain is None else {"domain": str(domain)}
    return {"python": platform.python_version(), "characters": spec.characters, **stand_in}


def _write_text(spec: DemoSpec, folder: Path, domain: Path | None) -> None:
    documents = library_documents(spec.characters)
    with whole_folder(folder) as new:
        general = [{"text": document.text, "kind": document.kind} for document in documents]
        _write_rows(new / GENERAL, general)
        if domain is None:
            _write_rows(new / DOMAIN, rows(word_problems(spec.problems, spec.seed)))
        else:
            (new / DOMAIN).symlink_to(domain)
        record = {
            "asked": _asked(spec, domain),
            "general": {
                "what": f"pieces of documentation and source of Python {platform.python_version()}",
                "file": str(folder.absolute() / GENERAL),
                "text": "{text}",
                "documents": len(documents),
                "prose": sum(document.kind == "prose" for document in documents),
                "characters": sum(len(document.text) for document in documents),
                "sha256": sha256_file(new / GENERAL),
            },
            "domain": {
                "what": f"made-up word problems, seed {spec.seed}: a stand-in for GSM8K"
                if domain is None
                else "training questions of GSM8K",
                "stand_in": domain is None,
                "file": str(folder.absolute() / DOMAIN),
                "text": "{question}",
                "documents": sum(1 for line in (new / DOMAIN).open("rb") if line.strip()),
                "sha256": sha256_file(new / DOMAIN),
            },
        }
        write_json(new / RECORD, record)


def _write_rows(path: Path, found: Iterable[Mapping[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
