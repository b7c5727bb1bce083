"""Load a recipe: find it, follow `extends`, apply overrides, validate, keep the positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from turbo_opt.compiler.base import registered_passes
from turbo_opt.compiler.pipeline import PassSpec
from turbo_opt.config.document import Document
from turbo_opt.config.explain import KeyPath, explain, format_path
from turbo_opt.config.lookup import find_recipe, shown
from turbo_opt.config.overrides import apply_override, cut_after, without
from turbo_opt.config.schema import Recipe
from turbo_opt.config.yaml_reader import read_yaml_file
from turbo_opt.errors import BadInput, unknown

SCHEMA_VERSION = 1


def load_recipe(
    name_or_path: str | Path,
    overrides: Iterable[str] = (),
    disable: Iterable[str] = (),
    until: str | None = None,
) -> Recipe:
    """The recipe of that name or path, with everything it extends.

    Args:
        name_or_path: a `.yaml` file, or a name such as `tiny-wan/cpu`: first looked for in the
            folder `recipes` of the current directory, then among the shipped ones.
        overrides: `KEY=VALUE` each, as `--set` takes them.
        disable: names of passes to leave out.
        until: the last pass to keep, `name` or `name[1]`.

    Raises:
        BadInput: anything wrong with it, one line per fault: `file:line:column: key.path: …`.
            Options of passes are checked by `turbo_opt.compiler.pipeline.validate_options`.
    """
    document = _read_chain(find_recipe(str(name_or_path)), [])
    for override in overrides:
        apply_override(document, override)
    recipe = _validate(document)
    specs: Sequence[PassSpec] = recipe.specs()
    for name in disable:
        specs = without(specs, name)
    if until is not None:
        specs = cut_after(specs, until)
    return recipe.with_passes(specs)


def _read_chain(path: Path, chain: list[Path]) -> Document:
    """The document in `path` laid over the ones that it extends."""
    document = read_yaml_file(path, shown(path))
    if not isinstance(document.data, dict):
        raise BadInput(document.complain((), "a recipe is a mapping of keys to values"))
    _check_version(document)
    parent = document.data.get("extends")
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise BadInput(document.complain(("extends",), f"must be text, got {parent!r}"))
    chain = [*chain, path.resolve()]
    try:
        found = find_recipe(parent, path.parent, skip=path)
    except BadInput as error:
        raise BadInput(document.complain(("extends",), str(error))) from None
    if found.resolve() in chain:
        loop = " → ".join(shown(link) for link in [*chain, found])
        raise BadInput(document.complain(("extends",), f"recipes extend each other: {loop}"))
    base = _read_chain(found, chain)
    base.merge(document)
    return base


def _check_version(document: Document) -> None:
    """Judge a file's format before its keys: those may have changed."""
    if "schema_version" not in document.data:
        raise BadInput(
            document.complain(
                (),
                f"required key schema_version is missing: add 'schema_version: {SCHEMA_VERSION}'",
            )
        )
    version = document.data["schema_version"]
    if version != SCHEMA_VERSION or isinstance(version, bool):
        message = f"{version!r} is not a format that this turbo_opt reads: {SCHEMA_VERSION}"
        raise BadInput(document.complain(("schema_version",), message))


def _validate(document: Document) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        problems = explain(Recipe, error, document.data)
        lines = [document.complain(p.path, p.message, at_key=p.at_key) for p in problems]
        raise BadInput("\n".join(lines)) from None
    _check_budgets(recipe, document)
    repeats = Counter(spec.name for spec in recipe.passes)
    seen: Counter[str] = Counter()
    located = []
    for position, spec in enumerate(recipe.passes):
        label = f"{spec.name}[{seen[spec.name]}]" if repeats[spec.name] > 1 else spec.name
        seen[spec.name] += 1
        origin = RecipeOrigin(document, ("passes", position), spec.name, label)
        located.append(replace(spec, origin=origin))
    paths = [("model", "source"), *(("weights", name) for name in recipe.weights)]
    locations = {format_path(path): document.location(path) for path in paths}
    folders = {key: location.folder for key, location in locations.items() if location}
    return recipe.with_passes(located).with_folders(folders)


def _check_budgets(recipe: Recipe, document: Document) -> None:
    """A budget for a pass that does not exist would silently do nothing."""
    own = {spec.name for spec in recipe.passes}
    for name in recipe.verify.budgets.passes:
        if name not in own and name not in registered_passes():
            path = ("verify", "budgets", "passes", name)
            message = unknown("pass", name, own | set(registered_passes()))
            raise BadInput(document.complain(path, message, at_key=True))


@dataclass(frozen=True)
class RecipeOrigin:
    """A pass written in a recipe.

    Attributes:
        document: the recipe with all that it extends.
        path: the item of `passes`.
        name: the pass.
        label: the pass as `--set` calls it, `quantize-linear[1]` where it runs more than once.
    """

    document: Document
    path: KeyPath
    name: str
    label: str

    def complain(self, path: KeyPath, message: str, *, at_key: bool = False) -> str:
        """`file:line:column: passes.name.option: message`."""
        where = (*self.path, self.name, *path)
        location = self.document.location(where, at_key=at_key or not path)
        label = format_path(("passes", self.label, *path))
        return f"{location or 'recipe'}: {label}: {message}"
