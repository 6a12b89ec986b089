"""From what was typed to a recipe, a cluster and sweeps; all mistakes at once."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra import storage, temporary
from infra.errors import UserError


def load(arguments: argparse.Namespace, recipe_needed: bool = True) -> tuple[Any, Any]:
    """Recipe and cluster from the arguments; all their errors in one UserError."""
    from pipelines import config

    overrides = list(getattr(arguments, "overrides", []))
    recipe_name = getattr(arguments, "recipe", None)
    if recipe_name is not None and "=" in recipe_name:  # `status key=value`
        recipe_name, overrides = None, [recipe_name, *overrides]
    own = [text.removeprefix("cluster.") for text in overrides if text.startswith("cluster.")]
    rest = _of_recipe(overrides)
    name = arguments.cluster or ("auto" if os.environ.get("RAY_ADDRESS") else "laptop")
    try:
        cluster = config.load_cluster(name, own)
    except UserError as error:
        if recipe_name is not None:
            try:
                config.load_recipe(recipe_name, rest)
            except UserError as more:
                raise UserError(f"{error}\n{more}") from None
        raise
    if arguments.workspace is not None:
        cluster = replace(cluster, workspace=arguments.workspace)
    if not cluster.workspace:
        raise UserError("workspace: empty; name a folder or an fsspec URL with --workspace")
    cluster = replace(cluster, workspace=storage.absolute(cluster.workspace))
    if os.environ.get("MLFLOW_TRACKING_URI") and cluster.tracking_uri is None:
        cluster = replace(cluster, tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    if not recipe_needed:
        return None, cluster
    if recipe_name is not None:
        recipe = _recipe(recipe_name, rest)
        return _with_sweeps(arguments, recipe, overrides), cluster
    saved = storage.join(cluster.workspace, "recipe.yaml")
    if not storage.exists(saved):
        raise UserError(
            f"nothing has run in workspace {cluster.workspace}; name a recipe, "
            f"or another --workspace"
        )
    if storage.is_local(saved):
        recipe = _recipe(saved, rest)
        return _with_sweeps(arguments, recipe, overrides), cluster
    with tempfile.TemporaryDirectory(dir=temporary.root()) as folder:
        local = os.path.join(folder, "recipe.yaml")
        Path(local).write_bytes(storage.read_bytes(saved))
        recipe = _recipe(local, rest)
        return _with_sweeps(arguments, recipe, overrides), cluster


def _recipe(name_or_path: str, overrides: Sequence[str]) -> Any:
    from pipelines import adopting, config

    recipe = _at_absolute_paths(config.load_recipe(name_or_path, overrides))
    adopting.refuse_contradictions(recipe, overrides)
    return recipe


def _of_recipe(overrides: Sequence[str]) -> list[str]:
    """Overrides that are neither the cluster's nor a sweep's."""
    return [text for text in overrides if not text.startswith(("cluster.", "sweep."))]


def _with_sweeps(arguments: argparse.Namespace, recipe: Any, overrides: Sequence[str]) -> Any:
    """The recipe with the sweeps that the arguments name."""
    from pipelines import config

    own = [text.removeprefix("sweep.") for text in overrides if text.startswith("sweep.")]
    names = list(getattr(arguments, "sweep", []))
    asked = getattr(arguments, "tune", False) or (_tunes(arguments) and not recipe.tune)
    if not names and (asked or (own and _tunes(arguments))):
        names = ["isolation"]
    if own and not names:
        raise UserError(f"sweep.{own[0]}: is a sweep's, and none is run; add --tune")
    if not names:
        return recipe
    sweeps = tuple(config.load_sweep(name, own) for name in names)
    try:
        return replace(recipe, tune=sweeps)
    except ValueError as error:
        raise UserError(str(error)) from error


def _tunes(arguments: argparse.Namespace) -> bool:
    """Whether the command is `tune`, which always has a sweep."""
    return hasattr(arguments, "extend")


def source(arguments: argparse.Namespace, recipe: Any) -> Any:
    """The recipe's text, for sweeps to vary; None where it is the workspace's own."""
    from pipelines import config

    name = getattr(arguments, "recipe", None)
    if name is None or "=" in name:
        return None
    # Trials are made elsewhere, where a relative path would be another.
    files = {
        stage: getattr(getattr(recipe, stage), "lpips", None) for stage in ("distill", "isolate")
    }
    absolute = [f"{stage}.lpips={path}" for stage, path in files.items() if path is not None]
    return config.read_source(name, [*_of_recipe(arguments.overrides), *absolute])


def _at_absolute_paths(recipe: Any) -> Any:
    """Relative paths are the shell's; workers and later commands may stand elsewhere."""
    from consistency.method_config import ConsistencyConfig

    if recipe.data.path is not None:
        data = replace(recipe.data, path=storage.absolute(recipe.data.path))
        recipe = replace(recipe, data=data)
    recipe = replace(recipe, reference=_reference_at_absolute_paths(recipe.reference))
    for name in ("teacher", "distill", "isolate"):
        stage = getattr(recipe, name)
        if stage.from_ is not None and not stage.from_.startswith("models:"):
            stage = replace(stage, from_=storage.absolute(stage.from_))
            recipe = replace(recipe, **{name: stage})
        if isinstance(stage, ConsistencyConfig) and stage.lpips is not None:
            stage = replace(stage, lpips=storage.absolute(stage.lpips))
            recipe = replace(recipe, **{name: stage})
    return recipe


def _reference_at_absolute_paths(reference: Any) -> Any:
    from pipelines import weights

    files = {
        key: storage.absolute(getattr(reference, key))
        for key in ("weights", "statistics")
        if getattr(reference, key) is not None
    }
    extractor = tuple(
        storage.absolute(entry) if weights.is_path(entry) else entry
        for entry in reference.extractor
    )
    return replace(reference, extractor=extractor, **files)


def tracking_uri(cluster: Any) -> str:
    """The registry that a cluster's runs go to."""
    from infra import tracking

    uri: str = cluster.tracking_uri or tracking.default_tracking_uri(cluster.workspace)
    return uri
