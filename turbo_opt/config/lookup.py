"""Find recipes: an explicit path, then the project's `recipes` folder, then the shipped ones."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turbo_opt.config.yaml_reader import read_yaml_file
from turbo_opt.errors import BadInput, nearest

Kind = Literal["project", "shipped"]


@dataclass(frozen=True)
class RecipeInfo:
    """One line of `turbo-opt recipes list`.

    Attributes:
        name: what `load_recipe` takes, such as `tiny-wan/cpu`.
        kind: from the project's `recipes` folder, or shipped with the package.
        path: its file.
        description: its own description, or that of the recipe it extends.
        error: why the file cannot be read, if so.
    """

    name: str
    kind: Kind
    path: Path
    description: str = ""
    error: str | None = None


def shown(path: Path) -> str:
    """A path as errors show it: relative to the current directory where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def find_recipe(name: str, base: Path | None = None, skip: Path | None = None) -> Path:
    """The file of a recipe.

    Args:
        name: a path that ends in `.yaml` or `.yml` or has a file, or a name like `tiny-wan/cpu`.
        base: folder that a relative path starts from; by default the current directory.
        skip: a file that is not meant: a project recipe may extend the shipped one of its name.

    Raises:
        BadInput: nothing of that name; the message names the nearest recipe.
    """
    direct = (base or Path()) / Path(name).expanduser()
    if name.endswith((".yaml", ".yml")):
        if not direct.is_file():
            raise BadInput(f"no recipe file {shown(direct)}")
        return direct
    if direct.is_file():
        return direct
    parts = name.split("/")
    if name and not any(part in ("", ".", "..") for part in parts):
        for _, root in _roots():
            path = root.joinpath(*parts[:-1], parts[-1] + ".yaml")
            if path.is_file() and not (skip and path.samefile(skip)):
                return path
    raise BadInput(_unknown_recipe(name))


def list_recipes() -> list[RecipeInfo]:
    """All recipes of the project and of the package, by name; the project's hide the shipped.

    Files named `base.yaml` are left out: they are there to be extended.
    """
    found: dict[str, RecipeInfo] = {}
    for kind, path, name in _files():
        if name in found or name.rpartition("/")[2] == "base":
            continue
        try:
            found[name] = RecipeInfo(name, kind, path, _description(path))
        except BadInput as error:
            found[name] = RecipeInfo(name, kind, path, error=str(error))
    return [found[name] for name in sorted(found)]


def _unknown_recipe(name: str) -> str:
    """The nearest recipe, and those of the same model if that is known, else the models."""
    known = dict.fromkeys(found for _, _, found in _files())
    model = name.partition("/")[0]
    same = [other for other in known if other.startswith(model + "/")]
    names = ", ".join(same or dict.fromkeys(other.partition("/")[0] for other in known))
    kind = "Known" if same or not known else "Known models"
    return f"unknown recipe {name!r}{nearest(name, known) or '.'} {kind}: {names or 'none'}."


def _roots() -> Iterator[tuple[Kind, Path]]:
    shipped = Path(str(importlib.resources.files("turbo_opt.recipes"))).resolve()
    project = Path("recipes").resolve()
    if project != shipped and project.is_dir():
        yield "project", project
    yield "shipped", shipped


def _files() -> Iterator[tuple[Kind, Path, str]]:
    for kind, root in _roots():
        for path in sorted(root.rglob("*.yaml")):
            yield kind, path, path.relative_to(root).with_suffix("").as_posix()


def _description(path: Path, depth: int = 0) -> str:
    data = read_yaml_file(path, shown(path)).data
    if not isinstance(data, dict):
        raise BadInput(f"{shown(path)}: not a recipe")
    if "description" in data or "extends" not in data or depth > 8:
        return str(data.get("description", ""))
    return _description(find_recipe(str(data["extends"]), path.parent, path), depth + 1)
