"""The recipes that ship, one file each, and how a name becomes a recipe.

To add one: a module here with `recipe(root) -> Recipe`, `root` being the folder of the data sets or
None, and its row below.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from suanli.base.errors import BadInputError
from suanli.training.recipe import Recipe, as_written
from suanli.workloads import reference
from suanli.workloads.reference import Options
from suanli.workloads.resolve import resolve
from suanli.workloads.userfile import load_object

RECIPES: dict[str, str] = {  # name -> "module:function"
    "cifar10-fast": "suanli.training.recipes.cifar10_fast:recipe",
    "mnist-fast": "suanli.training.recipes.mnist_fast:recipe",
}


def resolve_recipe(
    ref: str, *, data: Path | None = None, weights: Path | str | None = None
) -> Recipe:
    """Make the recipe that a reference names.

    Args:
        ref: A recipe that ships, a workload with training settings, `file.py:name` of a recipe or a
            workload, or the `ref` of a recipe, which makes the same one in another process.
        data: Folder of the data sets (`SUANLI_DATA` stands in).
        weights: safetensors file to start from; without it a run starts anew.

    Raises:
        BadInputError: Nothing has that name, or it cannot be trained.
    """
    base, options = reference.parse(ref)
    if base in RECIPES:
        return _shipped(base, options, data)
    path, colon, name = base.rpartition(":")
    if colon and path.endswith(".py"):
        found = load_object(Path(path), name)
        if isinstance(found, Recipe):
            own = reference.write(f"{Path(path).resolve()}:{name}", options)
            return replace(found, ref=own)
    # a run starts from the layers' own initialisation, not from weights kept by an earlier one
    start = weights if weights is not None else (None if options.weights else "none")
    return as_written(resolve(ref, data=data, weights=start))


def _shipped(name: str, options: Options, data: Path | None) -> Recipe:
    folder = str(data.resolve()) if data else options.data
    if not folder and os.environ.get("SUANLI_DATA"):
        folder = str(Path(os.environ["SUANLI_DATA"]).resolve())
    module, _, function = RECIPES[name].partition(":")
    make: Callable[[Path | None], Recipe] = getattr(import_module(module), function)
    made = make(Path(folder) if folder else None)
    if made.workload.data is None:
        raise BadInputError(
            f"{name} has no data to train with",
            next_step="give the folder of the data sets with --data or SUANLI_DATA",
        )
    return replace(made, ref=reference.write(name, Options(data=folder)))
