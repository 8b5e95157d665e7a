"""Whether the YAML file of a task runs code: what a stranger's file may not do unless the recipe says so."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from transplant_ray.errors import DataError, RecipeError


class _Function(str):
    """What `!function` names."""


class _Loader(yaml.SafeLoader):
    """Reads a task's file and runs nothing of it; tags that it does not know are errors."""


_Loader.add_constructor("!function", lambda _, node: _Function(node.value))

_RUNS = {
    "class": "a Python class",
    "unsafe_code": "code that a model has written",
    "custom_dataset": "a function that makes the data",
    "use_prompt": "prompts of another library",
    "trust_remote_code": "the code of a dataset",
    "hf_evaluate": "the code of a metric on the hub",
}
"""Keys that run code where they are set."""


def check_code(path: Path, library: Path) -> None:
    """RecipeError where the file, or one that it includes, runs code; files of the library are as trusted as it is.

    DataError where one cannot be read.
    """
    for file, settings in _files(path.resolve(), library, ()):
        for what in _running(settings):
            raise RecipeError(
                f"`task.lm_eval`: {file} runs code: {what}. Read it, and if you trust it add `accept: [task_code]` to the recipe."
            )


def _files(path: Path, library: Path, seen: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The file and those that it includes, but the library's own."""
    if path.is_relative_to(library):
        return
    if path in seen:
        raise DataError(f"{path}: includes itself.")
    settings = _read(path)
    yield path, settings
    includes = settings.get("include") or []
    for name in includes if isinstance(includes, list) else [includes]:
        yield from _files((path.parent / str(name)).resolve(), library, (*seen, path))


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give the path of a task's YAML file.") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not the YAML of a task ({error}).") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: found {type(settings).__name__}, expected the settings of a task.")
    return settings


@cache
def _metrics() -> frozenset[str]:
    """Names that the library knows; for any other it looks for a file of that name, and on the hub."""
    from lm_eval.api import metrics  # noqa: F401  # what fills the registry
    from lm_eval.api.registry import metric_registry

    return frozenset(metric_registry)


def _running(value: Any, key: str = "") -> Iterator[str]:
    """What runs code, in words."""
    if isinstance(value, _Function):
        yield f"`{key}: !function {value}`"
    elif key in _RUNS and value:
        yield f"`{key}` ({_RUNS[key]})"
    elif key == "metric" and isinstance(value, str) and value not in _metrics():
        yield f"`metric: {value}`, which is none of the library's, so it would be loaded as a file or from the hub"
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _running(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _running(inner, key)
