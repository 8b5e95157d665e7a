"""What a submitted job is made of: the recipe and the inputs that travel with it, the package, the command, the environment.

A relative path in a recipe travels; an absolute one must be there on the cluster. Nothing here needs Ray or a network.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from transplant_ray import zoo
from transplant_ray.addresses import redact_address
from transplant_ray.errors import CheckpointError, DataError, JobError, OrganError, RecipeError
from transplant_ray.files import sha256_file
from transplant_ray.organ.manifest import MANIFEST
from transplant_ray.organ.text import data_files
from transplant_ray.recipe import CARRIED, AnyRecipe, CompareRecipe, OrganRecipe, Recipe, carry_recipe, load_any_recipe

Command = Literal["sweep", "rank", "organ sweep", "organ compare"]
COMMANDS: Mapping[Command, type[AnyRecipe]] = {
    "sweep": Recipe,
    "rank": Recipe,
    "organ sweep": OrganRecipe,
    "organ compare": CompareRecipe,
}
"""What a job may do, and the kind of recipe that it does it with; the first of a kind where nobody says."""
RECIPE = "recipe.yaml"
DATABASE = "sqlite:///"
"""What the address of a database in a file begins with."""
LIMIT = 100 * 2**20
"""Bytes that travel with one job: the head keeps them in its memory."""
DATA_FILES = (".jsonl", ".parquet")
TEXT_FILES = (*DATA_FILES, ".txt", ".md", ".rst")
TASK_FILES = (".yaml", ".yml")
NEIGHBOURS = frozenset({"include", "data_files", "data_dir"})
"""Keys by which the file of an `lm_eval` task names other files."""
STOP_SECONDS = "30"
"""Between SIGTERM and SIGKILL when a job is stopped; Ray's own default is 3, too short to end a sweep cleanly."""
SUBMISSION_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}"


@dataclass(frozen=True)
class Pack:
    """A folder that becomes the working directory of a job."""

    folder: Path
    recipe: AnyRecipe
    """As the job will read it."""

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*")) if path.is_file())

    @property
    def text(self) -> str:
        return (self.folder / RECIPE).read_text(encoding="utf-8")


def pack(path: str | Path, overrides: Sequence[str], folder: Path) -> Pack:
    """Put a recipe of any kind, its overrides and the inputs that it names by relative paths into an empty folder.

    Overrides end in the recipe and not in the command, which Ray shows to everybody. Raises before anything is copied where the
    recipe is not one, or would lose its results; and where an input cannot travel.
    """
    refuse_relative_outputs(load_any_recipe(path, overrides))
    luggage = _Luggage(folder)
    settings = carry_recipe(path, overrides, luggage.carry)
    (folder / RECIPE).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return Pack(folder, load_any_recipe(folder / RECIPE))


def command_for(recipe: AnyRecipe, asked: str | None) -> Command:
    """What is asked for, or what such a recipe is for. JobError where it is not for that."""
    fitting = [command for command, kind in COMMANDS.items() if isinstance(recipe, kind)]
    if asked is None:
        return fitting[0]
    for command in fitting:
        if command == asked:
            return command
    what = "does not fit" if asked in COMMANDS else "no such command"
    raise JobError(
        f"--command {asked!r}: {what}. {recipe.name} is a recipe for {' or '.join(fitting)}: give that, or no --command."
    )


def refuse_relative_outputs(recipe: AnyRecipe) -> None:
    """RecipeError where results would land in Ray's own session folder: lost to whoever submitted the job."""
    refuse_relative("storage", recipe.storage)
    refuse_relative_database("tracking.uri", recipe.tracking.uri)


def refuse_relative_database(key: str, uri: str) -> None:
    if uri.startswith(DATABASE):
        refuse_relative(key, uri.removeprefix(DATABASE), DATABASE)


def refuse_relative(key: str, path: str, start: str = "") -> None:
    """`start` is what stands before the path in the setting `key`."""
    if path and "://" not in path and not path.startswith("~") and not Path(path).is_absolute():
        raise RecipeError(
            f"`{key}` is the relative path {path!r}, which a submitted job would write into Ray's session folder and lose. "
            f"Give an absolute path on shared storage, e.g. {key}={start}/shared/{path}."
        )


def entrypoint(command: Command, python: str = "python") -> str:
    """The shell command of a job."""
    return shlex.join([python, "-m", "transplant_ray.cli", *command.split(), RECIPE])


def environment(given: Mapping[str, Any], pack: Pack, package: Path = zoo.HOME.parent) -> dict[str, Any]:
    """Ray's runtime environment: what is given, with the folder as working directory and this very package beside it."""
    unused = [f"/zoo/{pair}" for pair in zoo.PAIRS if f"{zoo.PREFIX}{pair}/" not in pack.text]
    return {
        **given,
        "working_dir": str(pack.folder),
        "py_modules": [*given.get("py_modules", ()), str(package)],
        "excludes": ["__pycache__", *unused],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS, **given.get("env_vars", {})},
    }


def read_environment(path: Path) -> dict[str, Any]:
    """The runtime environment in a YAML or JSON file. JobError names keys and never values, which may be secrets."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read ({error}). Give a YAML file as in cluster/runtime-env.yaml.") from error
    except (yaml.YAMLError, ValueError, RecursionError):
        raise JobError(f"{path}: not valid YAML. Give a file as cluster/runtime-env.yaml.") from None
    if not isinstance(given, dict):
        raise JobError(f"{path}: found {type(given).__name__}, expected a mapping such as {{env_vars: {{NAME: value}}}}.")
    if "working_dir" in given:
        raise JobError(f"{path}: `working_dir` is what `submit` packs: the recipe and what it names. Remove the key.")
    for key, expected in (("env_vars", dict), ("py_modules", list)):
        if not isinstance(given.get(key, expected()), expected):
            raise JobError(f"{path}: `{key}` is a {type(given[key]).__name__}, expected a {expected.__name__}.")
    for name, value in given.get("env_vars", {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise JobError(f"{path}: `env_vars.{name}` is a {type(value).__name__}, expected text. Put it between quotes.")
    return given


def read_resources(pairs: Iterable[str]) -> dict[str, float]:
    """Custom resources, `NAME=N` each."""
    resources = {}
    for pair in pairs:
        name, _, amount = pair.partition("=")
        try:
            resources[name] = float(amount)
        except ValueError:
            resources[name] = math.nan
        if not name or not 0 < resources[name] < math.inf:
            raise JobError(f"--entrypoint-resource {pair!r}: expected NAME=N with a positive number, e.g. head=1.")
    return resources


def metadata(recipe: AnyRecipe, command: Command) -> dict[str, str]:
    """What Ray keeps with a job and shows to whoever looks: no credentials."""
    return {"command": command, "recipe": recipe.name, "identity": recipe.identity(), "results": shown_results(recipe)}


def shown_results(recipe: AnyRecipe) -> str:
    """Where the job writes, without user, password and settings of the connection."""
    if "://" not in recipe.storage:
        return f"{recipe.storage.rstrip('/')}/{recipe.name}"
    address = re.split("[?#]", redact_address(recipe.storage))[0]  # in this order: a password may hold both
    return f"{address.rstrip('/')}/{recipe.name}"


def check_id(id: str) -> str:
    """JobError where it is no submission id: it becomes a part of addresses and file names."""
    if not re.fullmatch(SUBMISSION_ID, id):
        raise JobError(
            f"{id[:200]!r} is no submission id: expected letters, digits, `.`, `_` and `-`. `transplant-ray status` lists them."
        )
    return id


class _Luggage:
    """Inputs on their way into a folder, each under the hash of its content: equal recipes make equal packs, on every head."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: dict[Path, int] = {}

    def carry(self, key: str, path: Path) -> str:
        files = list(_MEMBERS[key](path))
        self._weigh(path, files)
        content = "".join(f"{sha256_file(file)} {name}\n" for name, file in files)
        digest = sha256_file(path) if path.is_file() else hashlib.sha256(content.encode()).hexdigest()
        place = self.folder / CARRIED / digest / (path.name if path.exists() else "text")  # a pattern is no name
        for name, file in files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place / name)
        return f"./{place.relative_to(self.folder).as_posix()}"

    def _weigh(self, path: Path, files: Iterable[tuple[str, Path]]) -> None:
        sizes = {file: file.stat().st_size for _, file in files}
        self.sizes |= sizes
        size, total = sum(sizes.values()), sum(self.sizes.values())
        if total > LIMIT:
            raise RecipeError(
                f"{path} has {size / 2**20:.1f} MiB, and with it {total / 2**20:.1f} MiB would travel with the job; "
                f"{LIMIT / 2**20:.0f} MiB may. Put it on storage that all nodes see and name it by its absolute path there, or put "
                "it on the hub."
            )


def _data(path: Path) -> Iterator[tuple[str, Path]]:
    if path.suffix not in DATA_FILES or not path.is_file():
        raise DataError(f"{path}: no such data file. Give a {' or '.join(DATA_FILES)} file, or a hub dataset {{path, split}}.")
    yield "", path


def _text(path: Path) -> Iterator[tuple[str, Path]]:
    """A file; or those of a folder or a pattern, in a folder where they have the order that they have here."""
    files = data_files(str(path))
    root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
    for file in files:
        name = file.relative_to(root)
        if file.suffix not in TEXT_FILES or any(part.startswith(".") for part in name.parts):
            raise DataError(
                f"{file}: does not travel with a job; {', '.join(TEXT_FILES)} files do that are not hidden. Put it on storage that "
                "all nodes see and name it by its absolute path there."
            )
        yield ("" if path.is_file() else name.as_posix()), file


def _model(path: Path) -> Iterator[tuple[str, Path]]:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no such model. Expected a folder with config.json and safetensors, or a hub id.")
    yield from _visible(path)


def _organ(path: Path) -> Iterator[tuple[str, Path]]:
    if not (path / MANIFEST).is_file():
        raise OrganError(f"{path}: no such organ. Expected a folder with {MANIFEST} and its safetensors.")
    yield from _visible(path)


def _visible(path: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), file


def _task(path: Path) -> Iterator[tuple[str, Path]]:
    if path.suffix not in TASK_FILES or not path.is_file():
        raise DataError(f"{path}: no such file. Give the YAML file of an lm_eval task, or its name.")
    if named := _names_others(path):
        raise RecipeError(
            f"`lm_eval`: {path} has `{named}`, so it does not stand alone and cannot travel. Put its folder on storage that all "
            "nodes see and name the file by its absolute path there."
        )
    yield "", path


_MEMBERS = {"data": _data, "text": _text, "model": _model, "organ": _organ, "lm_eval": _task}
"""Key of an input → what of it travels: names inside it, and files."""


def _names_others(path: Path) -> str | None:
    """The key or tag by which a task's YAML file leans on other files."""
    try:
        for event in yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader):
            tag, value = getattr(event, "tag", None), getattr(event, "value", None)
            if tag == "!function" or (isinstance(event, yaml.ScalarEvent) and value in NEIGHBOURS):
                return str(tag if tag == "!function" else value)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not the YAML of a task ({error}).") from error
    return None
