"""Recipes from YAML files, with overrides from the command line.

    recipe = load_recipe("jobs/recipes/cross-generation.yaml", ["sweep.k=[1,2]"])

Paths of inputs (models, data) are relative to the recipe's folder, so that a recipe and its data travel together; paths in
overrides, `storage` and `tracking.uri` are relative to the working directory, where results belong. `carry_recipe` packs both.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from transplant_ray import zoo
from transplant_ray.addresses import redact
from transplant_ray.errors import RecipeError
from transplant_ray.recipe.compare import CompareRecipe
from transplant_ray.recipe.corpus import HUB
from transplant_ray.recipe.demo import DemoSpec
from transplant_ray.recipe.organs import OrganRecipe
from transplant_ray.recipe.part import Part
from transplant_ray.recipe.training import TrainingSpec
from transplant_ray.recipe.whole import Recipe

AnyRecipe = Recipe | OrganRecipe | CompareRecipe
Place = Callable[[str, Path, str], str]
"""The text of an input, what a relative path starts from, and the key: where the input is."""
Carry = Callable[[str, Path], str]
"""The key of an input and its path here: its name elsewhere."""
P = TypeVar("P", bound=Part)
TEXT = "text"
"""The key under which `Place` and `Carry` are told of `data` that are read as they come: folders and patterns too."""
LONGEST = 1_000_000
"""Characters of a recipe, what its aliases stand for written out."""
LONGEST_SHOWN = 200
"""Characters of a value that an error shows."""
LONGEST_SEARCHED = 5_000
"""Characters of an error that are searched for credentials; the time that takes grows with their square. The rest is not shown."""
MOST_PROBLEMS = 20
"""Problems of one recipe that an error tells."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides, e.g. `sweep.k=[1,2]`; values are YAML.

    Raises RecipeError for a missing file, broken YAML, an unknown key or a value out of range.
    """
    return parse_recipe(_settings(Path(path), overrides, _absolute), where=str(path))


def load_organ_recipe(path: str | Path, overrides: Sequence[str] = ()) -> OrganRecipe:
    """The same for the sweep of organs, e.g. `sweep.positions=[0,1]`."""
    return parse_organ_recipe(_settings(Path(path), overrides, _absolute), where=str(path))


def parse_organ_recipe(mapping: dict[str, Any], where: str = "recipe") -> OrganRecipe:
    return _validated(OrganRecipe, mapping, where)


def make_organ_recipe(settings: dict[str, Any], overrides: Sequence[str] = ()) -> OrganRecipe:
    """One that is said on the command line alone: its paths are relative to the working directory."""
    _place_inputs(settings, Path.cwd(), _absolute)
    changes = _overrides(overrides)
    _place_inputs(changes, Path.cwd(), _absolute)
    return parse_organ_recipe(_merge(settings, changes), where="sweep")


def load_compare_recipe(path: str | Path, overrides: Sequence[str] = ()) -> CompareRecipe:
    """Read the recipe of a comparison and apply overrides, as `load_recipe` does."""
    return _validated(CompareRecipe, _settings(Path(path), overrides, _absolute), where=str(path))


def load_any_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """The same for a recipe of whichever kind: the one that knows most of its keys."""
    settings = _settings(Path(path), overrides, _absolute)
    kinds: tuple[type[AnyRecipe], ...] = (Recipe, OrganRecipe, CompareRecipe)
    return _validated(max(kinds, key=lambda kind: len(kind.model_fields.keys() & settings.keys())), settings, str(path))


def carry_recipe(path: str | Path, overrides: Sequence[str], carry: Carry) -> dict[str, Any]:
    """The settings of a recipe, overrides included, that is going to be read on another machine.

    What is named by a relative path is handed to `carry`, under its key, and called what that answers. Absolute paths, those in
    a home, `zoo:` and the hub stay what they are.
    """

    settings = _settings(Path(path), overrides, _marked)
    _place_inputs(settings, Path(), lambda text, _, key: carry(key, Path(text)) if isinstance(text, _Relative) else text)
    return settings


class _Relative(str):
    """The absolute path of what a recipe names by a relative one."""


def _marked(text: str, base: Path, key: str) -> str:
    absolute = _absolute(text, base, key)
    stays = absolute == text or text.startswith("~") or Path(text).is_absolute()
    return text if stays else _Relative(absolute)


def _settings(path: Path, overrides: Sequence[str], place: Place) -> dict[str, Any]:
    """The file with the overrides in it, and every input where `place` puts it."""
    mapping = _read_mapping(path)
    _place_inputs(mapping, path.resolve().parent, place)
    changes = _overrides(overrides)
    _place_inputs(changes, Path.cwd(), place)
    return _merge(mapping, changes)


def parse_recipe(mapping: dict[str, Any], where: str = "recipe") -> Recipe:
    return _validated(Recipe, mapping, where)


def parse_training(data: Sequence[str], overrides: Sequence[str] = ()) -> TrainingSpec:
    """How an organ is trained, from the command line: `key=value` as `load_recipe` reads them. RecipeError where it cannot be."""
    return _validated(TrainingSpec, {**_overrides(overrides), "data": list(data)}, "training")


def parse_demo(overrides: Sequence[str] = ()) -> DemoSpec:
    """How large the organ demo is, with `key=value` changes. RecipeError where it cannot be."""
    return _validated(DemoSpec, _overrides(overrides), "demo")


def _validated(model: type[P], mapping: dict[str, Any], where: str) -> P:
    try:
        return model.model_validate(mapping)
    except ValidationError as error:
        problems = error.errors()
        told = [f"{where}: {_without_secrets(_explain(problem, model))}" for problem in problems[:MOST_PROBLEMS]]
        more = [f"{where}: {len(problems) - MOST_PROBLEMS} more of the kind."] if len(problems) > MOST_PROBLEMS else []
        raise RecipeError("\n".join(told + more)) from None


class _CarefulLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win in silence, and a few aliases stand for billions of values; we do not."""

    def get_single_node(self) -> yaml.Node | None:
        root: yaml.Node | None = super().get_single_node()
        if root is not None and _length(root, {}) > LONGEST:
            found = f"with its aliases written out it has more than {LONGEST} characters, or an alias holds itself"
            raise yaml.constructor.ConstructorError(None, None, found, root.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(str(key.value) for key, _ in node.value)
        if repeated := sorted(key for key, count in keys.items() if count > 1):
            raise yaml.constructor.ConstructorError(None, None, f"key {repeated[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _length(node: yaml.Node, known: dict[int, float]) -> float:
    """Characters of a value with its aliases written out, about; infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = inf  # what an alias inside of it finds
        if isinstance(node, yaml.ScalarNode):
            known[id(node)] = 1 + len(node.value)
        else:
            parts = chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
            known[id(node)] = 1 + sum(_length(part, known) for part in parts)
    return known[id(node)]


def _yaml(text: str) -> Any:
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"more than {LONGEST} characters")
    try:
        return yaml.load(text, Loader=_CarefulLoader)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        # PyYAML lets these out where a value does not fit its tag (`!!int x`, the date 2024-13-45), or nests too deep
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__}: {error})") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            mapping = _yaml(file.read(LONGEST + 1))  # and not all of what may be no recipe at all
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}). Give the path of a YAML recipe.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {_finding(error)}") from None
    if not isinstance(mapping, dict):
        raise RecipeError(f"{path}: found {type(mapping).__name__}, expected a mapping with the keys of a recipe.")
    return mapping


def _overrides(pairs: Iterable[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not all(key.split(".")):
            raise RecipeError(f"override {_shown(pair)}: expected key=value, for example sweep.k=[1,2].")
        try:
            value = _yaml(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"override {_shown(pair)}: the value is not valid YAML: {_finding(error)}") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        changes = _merge(changes, value)
    return changes


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _place_inputs(mapping: dict[str, Any], base: Path, place: Place) -> None:
    """Put the models and data of a mapping where `place` says, in place."""
    for section in _sections(mapping):
        for key in ("model", "data", "lm_eval"):
            section.update({key: _placed(section[key], base, key, place)} if key in section else {})
    for corpus in (_mapping(mapping.get(name)) for name in ("training", "domain", "general")):
        corpus.update({"data": _placed(corpus["data"], base, TEXT, place)} if "data" in corpus else {})
    organs = _mapping(mapping.get("organs"))
    for name, folder in organs.items():
        organs[name] = place(folder, base, "organ") if isinstance(folder, str) else folder


def _placed(value: Any, base: Path, key: str, place: Place) -> Any:
    """One input, or a list of them; what is on the hub stays."""
    if isinstance(value, list):
        return [_placed(each, base, key, place) for each in value]
    return place(value, base, key) if isinstance(value, str) and not value.startswith(HUB) else value


def _sections(mapping: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a recipe that name a model, or the data of a task."""
    guards = _mapping(mapping.get("guards"))
    named = (*_mapping(guards.get("tasks")).values(), *_mapping(mapping.get("tasks")).values())
    tasks = [_mapping(task) for task in (mapping.get("task"), *named)]
    parts = [mapping.get(name) for name in ("source", "target", "base", "recipient", "model")]
    parts += _mapping(mapping.get("models")).values()
    yield from map(_mapping, (*parts, guards.get("text"), *tasks, *(task.get("shots") for task in tasks)))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _absolute(text: str, base: Path, key: str) -> str:
    """The absolute path of an input; what is not a path (a hub id, `zoo:`) stays."""
    if text.startswith((zoo.PREFIX, HUB)):
        return text
    is_file = key in ("data", "organ", TEXT) or text.endswith((".yaml", ".yml"))
    try:
        path = base / Path(text).expanduser()
        return str(path) if is_file or text.startswith((".", "/", "~")) or path.exists() else text
    except (OSError, RuntimeError) as error:  # a name that is too long, the home of a user who is not there
        why = getattr(error, "strerror", None) or error  # and not the path, in which no credential looks like one any more
        raise RecipeError(f"{_shown(text)} cannot be a path ({why}).") from None


_UNION = ("str", "HubData")
"""What pydantic calls the alternatives of `task.data`; users never wrote them."""


def _explain(problem: Any, model: type[Part]) -> str:
    """One pydantic problem in our words: place, finding, expectation."""
    what = "training" if model is TrainingSpec else "recipe"
    place = ".".join(str(part) for part in problem["loc"] if part not in _UNION) or f"the {what}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"`{place}` is not a key of a {what}.{_nearest(place, model)}"
    if problem["type"] == "missing":
        return f"`{place}` is missing; it has no default."
    if isinstance(problem["input"], dict) and problem["type"] == "value_error":  # about several keys: the message names them
        return f"{place}: {message}."
    return f"`{place}` is {_shown(problem['input'])}: {message}."


def _shown(value: Any) -> str:
    text = _without_secrets(repr(value))  # before it is cut: half of an address does not look like one
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _without_secrets(text: str) -> str:
    """An error as it may be shown. It quotes a recipe, and so perhaps an address with a password where none belongs."""
    return redact(text[:LONGEST_SEARCHED])


def _finding(error: yaml.YAMLError) -> str:
    """What PyYAML says. Of a line with a secret it shows no piece, for half of an address does not look like one."""
    for mark in filter(None, (getattr(error, name, None) for name in ("context_mark", "problem_mark"))):
        line = mark.get_snippet(max_length=LONGEST_SEARCHED) or ""
        if redact(line) != line:
            mark.buffer = None
    return _without_secrets(str(error))


def _nearest(place: str, model: type[Part]) -> str:
    known = list(_keys(model))
    near = difflib.get_close_matches(place, known, n=2, cutoff=0.6)
    others = " See `transplant-ray plan --help`." if model is Recipe else f" It has {', '.join(known)}."
    return f" Did you mean {' or '.join(f'`{key}`' for key in near)}?" if near else others


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *get_args(field.annotation)):  # a section may be left out, and is a union with None then
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _keys(part, f"{prefix}{name}.")
