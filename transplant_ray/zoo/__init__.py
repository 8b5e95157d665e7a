"""The zoo: three small trained model pairs that ship with the package; see the README beside this file.

`zoo:cross-generation/source` in a recipe names a file or folder here, wherever the package is installed.
"""

from pathlib import Path

from transplant_ray.errors import RecipeError

PREFIX = "zoo:"
HOME = Path(__file__).parent
PAIRS = ("cross-generation", "base-instruct", "siblings")


def resolve(name: str) -> str:
    """The path behind a `zoo:` name; any other text is returned as it is. RecipeError where the zoo has no such thing."""
    if not name.startswith(PREFIX):
        return name
    path = (HOME / name.removeprefix(PREFIX)).resolve()
    if not path.is_relative_to(HOME) or not path.exists():
        raise RecipeError(f"{name}: the zoo has no such file. Pairs are {', '.join(PAIRS)}, e.g. zoo:{PAIRS[0]}/source.")
    return str(path)


def recipe_path(pair: str) -> Path:
    """The recipe of a pair's main sweep."""
    if pair not in PAIRS:
        raise RecipeError(f"{pair!r} is not a pair of the zoo; expected one of {', '.join(PAIRS)}.")
    return HOME / pair / "recipe.yaml"
