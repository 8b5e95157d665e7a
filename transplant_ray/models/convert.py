"""Pickle checkpoints, where a recipe accepts them: converted to safetensors once, and read as such from then on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from pickle import UnpicklingError

from transformers import AutoModelForCausalLM

from transplant_ray.errors import CheckpointError
from transplant_ray.files import sha256_file, whole_folder

COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Files that travel with the weights: config, tokenizer, generation config, template, licence. Pickles never do."""


def is_pickle_only(folder: Path) -> bool:
    return any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))


def converted(folder: Path, *, remote_code: bool = False) -> Path:
    """The folder of a safetensors copy of a pickle checkpoint, keyed by its content, made where it is not there yet.

    Loads the model once. torch unpickles tensors only (`weights_only`), yet a stranger's pickle is a risk to take knowingly.
    """
    content = [sha256_file(path) for path in sorted((*folder.glob("*.bin"), *folder.glob("*.json")))]
    key = hashlib.sha256("".join(content).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    place = home / "transplant_ray" / "converted" / key
    if place.exists():
        return place
    with whole_folder(place) as out:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=False, trust_remote_code=remote_code)
        except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
            raise CheckpointError(f"{folder}: its pickle weights cannot be loaded: {error}") from error
        model.save_pretrained(out)
        for pattern in COMPANIONS:
            for path in folder.glob(pattern):
                if not (out / path.name).exists() and not path.name.endswith(".index.json"):
                    (out / path.name).write_bytes(path.read_bytes())
    return place
