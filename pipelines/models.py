"""A model by the name a person gives it: `models:/NAME@ALIAS`, a step of the workspace, a folder,
or a file of another project that can be imported.

Each becomes a local folder with `weights.safetensors` and a description. Commands that take "any
model" go through here.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import storage, temporary
from infra.errors import UserError
from pipelines import importing
from pipelines.artifacts import Evaluation, from_json
from pipelines.model_record import FILES
from pipelines.steps import search_sigmas, select_ema

if TYPE_CHECKING:
    from consistency.published import ModelDescription, PublishedModel

CANDIDATES = ("distill", "isolate", "truncate")
REFINED = (search_sigmas.step_name, select_ema.step_name)  # the last one first
STEPS = ("teacher", *CANDIDATES, *(name(one) for name in REFINED[::-1] for one in CANDIDATES))


def load(name: str | None, workspace: str, tracking_uri: str) -> "PublishedModel":
    """A model ready to sample. Raises UserError for what is none, with how to mend it."""
    from safetensors.torch import load_file

    from consistency import published

    with located(name, workspace, tracking_uri) as (folder, about), _whole(folder):
        return published.build(about, load_file(folder / "weights.safetensors"))


@contextlib.contextmanager
def located(
    name: str | None, workspace: str, tracking_uri: str
) -> Iterator[tuple[Path, "ModelDescription"]]:
    """A local folder with the model's `weights.safetensors`, and how the model is sampled.

    What had to be fetched goes at the end of the context. Raises UserError.
    """
    from consistency.published import ModelDescription

    with tempfile.TemporaryDirectory(dir=temporary.root()) as scratch:
        if name is not None and name.startswith("models:"):
            yield _registered(name, tracking_uri, Path(scratch))
            return
        folder, mid_sigma = folder_of(name, workspace, Path(scratch))
        with _whole(folder):
            about = ModelDescription.from_json((folder / "config.json").read_text())
        yield folder, about if mid_sigma is None else replace(about, mid_sigma=mid_sigma)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """JSON, safetensors and torch each have their own exceptions for damage."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder} is not a whole model: {str(error).splitlines()[0]}") from error


def folder_of(model: str | None, workspace: str, scratch: Path) -> tuple[Path, float | None]:
    """A model folder, and the second noise level it was evaluated with where that is known.

    Files that lie elsewhere are fetched to `scratch`.
    """
    if model is not None and model not in STEPS:
        return _fetched(model, scratch), None
    if not storage.is_local(workspace):
        raise UserError(
            "models of a remote workspace: give the registered one, models:/..., or a folder's URL"
        )
    from pipelines import dag

    if model is not None:
        record = dag.latest_record(model, workspace)
        if record is None:
            raise UserError(f"step {model} has no result in workspace {workspace}; run a recipe")
        return _files(workspace, record), None
    # The very files that were registered last, sampled as they were scored.
    registered = dag.latest_record("register", workspace)
    if registered is None:
        raise UserError(f"no model in workspace {workspace} yet; run a recipe, or name a model")
    candidate = registered["value"]["candidate"]
    try:
        evaluated = from_json(Evaluation, _input(workspace, registered, "evaluate")["value"])
    except (TypeError, KeyError):
        raise UserError(
            f"workspace {workspace} is another version's; run the recipe again, or name a model"
        ) from None
    return _files(workspace, _input(workspace, registered, candidate)), evaluated.mid_sigma


def _fetched(folder: str, scratch: Path) -> Path:
    """A folder or file of any store as a folder here, checked against its record if it has one."""
    missing = [name for name in FILES if not storage.exists(storage.join(folder, name))]
    if importing.is_file(folder) or (missing and importing.is_diffusers(folder)):
        importing.write(importing.read(folder), str(scratch))
        return scratch
    if FILES[0] in missing:
        raise UserError(
            f"{folder}: no such model; give models:/NAME@ALIAS, a file to import, a folder with "
            f"{' and '.join(FILES)}, or one of {', '.join(STEPS)}"
        )
    if missing:
        raise UserError(f"{folder} is not a whole model: {missing[0]} is not there")
    return importing.fetched(folder, scratch)


def _registered(name: str, tracking_uri: str, scratch: Path) -> tuple[Path, "ModelDescription"]:
    """A registered model's weights as safetensors; its description is how it is served."""
    import torch
    from safetensors.torch import save_file

    from consistency.published import ModelDescription
    from infra import tracking

    folder = tracking.download_model(tracking_uri, name, scratch)
    with contextlib.suppress(FileNotFoundError):
        about = ModelDescription.from_json((folder / "artifacts" / "config.json").read_text())
        weights = torch.load(folder / "artifacts" / "weights.pt", weights_only=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, scratch / "weights.safetensors")
        return scratch, about
    raise UserError(f"{name} is not a model that cmforge registered")


def _input(workspace: str, record: dict[str, Any], name: str) -> dict[str, Any]:
    """The record of one input of a recorded step: of that name, or what was chosen of its EMAs and
    noise levels."""
    from pipelines import dag

    inputs = {i["name"]: i["fingerprint"] for i in record["identity"]["inputs"]}
    for step in (name, *(step_name(name) for step_name in REFINED)):
        home = dag.home_at(workspace, step, inputs[name])
        if storage.exists(storage.join(home, "COMMIT.json")):
            return dag.read_record(home)
    raise UserError(f"the {name} registered last is gone from workspace {workspace}; run it again")


def _files(workspace: str, record: dict[str, Any]) -> Path:
    from pipelines.dag import home_at

    home = home_at(workspace, record["step"], record["fingerprint"])
    return Path(storage.join(home, "attempts", record["attempt"]))
