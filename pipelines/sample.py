"""`cmforge sample`: a grid of images from a model of the workspace, a folder or the registry."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import UserError
from pipelines import png
from pipelines.artifacts import Evaluation, from_json
from pipelines.steps import select_ema

MAX_IMAGES = 10_000
TEACHER_STEPS = 18
CANDIDATES = ("distill", "isolate", "truncate")
STEPS = ("teacher", *CANDIDATES, *map(select_ema.step_name, CANDIDATES))


def draw(
    model: str | None,
    workspace: str,
    tracking_uri: str | None,
    *,
    num: int,
    steps: int | None,
    seed: int,
    label: int | None,
    levels: Sequence[float] | None = None,
    guidance: float = 1.0,
    out: Path,
) -> Path:
    """Write a PNG grid of `num` images; returns its path. Raises UserError.

    `levels` and `guidance` as in `PublishedModel.generate`; a registered model takes neither.
    """
    if not 1 <= num <= MAX_IMAGES:
        raise UserError(f"--num: {num} must be between 1 and {MAX_IMAGES}")
    if steps is not None and steps < 1:
        raise UserError(f"--steps: {steps} must be at least 1")
    if steps is not None and levels is not None:
        raise UserError("--levels: one evaluation at each of them; leave --steps out")
    if not math.isfinite(guidance):
        raise UserError(f"--guidance: {guidance} must be a finite number")
    if tracking_uri is not None and (levels is not None or guidance != 1):
        option = "--guidance" if levels is None else "--levels"
        raise UserError(f"{option}: a registered model has none; give a model folder or a step")
    if guidance != 1 and model == "teacher":
        _require_null_class(workspace)
    try:
        if tracking_uri is not None:
            assert model is not None
            images = _from_registry(model, tracking_uri, num, steps or 1, seed, label)
        else:
            loaded = _load(*folder_of(model, workspace))
            denoiser = loaded.description.kind == "denoiser"
            default = TEACHER_STEPS if denoiser else len(levels or [0])
            images = loaded.generate(
                range(num),
                steps=steps or default,
                seed=seed,
                label=label,
                levels=levels,
                guidance=guidance,
            )
    except ValueError as error:
        raise UserError(f"sample: {error}") from error
    scale = png.tile_scale(int(images.shape[1]))
    with storage.mendable(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(png.encode_png(png.grid(images, min(10, num), scale=scale)))
    return out.resolve()


def levels_of(text: str) -> list[float]:
    """`80,0.8` as numbers. Raises UserError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--levels: {text!r} is not a list of numbers, such as 80,0.8") from None


def _from_registry(model: str, uri: str, num: int, steps: int, seed: int, label: int | None) -> Any:
    from infra import tracking

    params = {"steps": steps, "seed": seed, "class": -1 if label is None else label}
    return tracking.predict(uri, model, num, {**params, "output": "uint8"})


def _load(folder: Path, mid_sigma: float | None) -> Any:
    from consistency import published

    try:
        loaded = published.load(folder)
        if mid_sigma is None:
            return loaded
        return replace(loaded, description=replace(loaded.description, mid_sigma=mid_sigma))
    except Exception as error:  # JSON, safetensors and torch each have their own for damage
        raise UserError(f"{folder} is not a whole model: {str(error).splitlines()[0]}") from error


def folder_of(model: str | None, workspace: str) -> tuple[Path, float | None]:
    """A model folder, and the second noise level it was evaluated with where that is known."""
    if model is not None and model not in STEPS:
        folder = Path(model)
        if not (folder / "weights.safetensors").is_file():
            raise UserError(
                f"{model}: no such model; give models:/NAME@ALIAS, a folder with "
                f"weights.safetensors and config.json, or one of {', '.join(STEPS)}"
            )
        return folder, None
    if not storage.is_local(workspace):
        raise UserError("sampling from a remote workspace: give the registered model, models:/...")
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


def _input(workspace: str, record: dict[str, Any], name: str) -> dict[str, Any]:
    """The record of one input of a recorded step: of that name, or a selection of its EMAs."""
    from pipelines import dag

    inputs = {i["name"]: i["fingerprint"] for i in record["identity"]["inputs"]}
    for step in (name, select_ema.step_name(name)):
        home = dag.home_at(workspace, step, inputs[name])
        if storage.exists(storage.join(home, "COMMIT.json")):
            return dag.read_record(home)
    raise UserError(f"the {name} registered last is gone from workspace {workspace}; run it again")


def _require_null_class(workspace: str) -> None:
    """Guidance leans on what the teacher says without a class: it must have learned that."""
    from pipelines import dag

    record = dag.latest_record("teacher", workspace)
    if record is None:
        return  # said where the model is looked for
    share = record["identity"]["config"]["training"].get("label_dropout", {"float": "0"})
    if float(share["float"]) == 0:
        raise UserError(
            "--guidance: this teacher learned no null class; train it with "
            "teacher.label_dropout=0.1"
        )


def _files(workspace: str, record: dict[str, Any]) -> Path:
    from pipelines.dag import home_at

    home = home_at(workspace, record["step"], record["fingerprint"])
    return Path(storage.join(home, "attempts", record["attempt"]))
