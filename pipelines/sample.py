"""`cmforge sample`: a grid of images from a model of the workspace, a folder or the registry."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import UserError
from pipelines import png

MAX_IMAGES = 10_000
TEACHER_STEPS = 18


def draw(
    model: str | None,
    workspace: str,
    tracking_uri: str | None,
    *,
    num: int,
    steps: int | None,
    seed: int,
    label: int | None,
    out: Path,
) -> Path:
    """Write a PNG grid of `num` images; returns its path. Raises UserError."""
    if not 1 <= num <= MAX_IMAGES:
        raise UserError(f"--num: {num} must be between 1 and {MAX_IMAGES}")
    if steps is not None and steps < 1:
        raise UserError(f"--steps: {steps} must be at least 1")
    try:
        if tracking_uri is not None:
            assert model is not None
            images = _from_registry(model, tracking_uri, num, steps or 1, seed, label)
        else:
            loaded = _load(*_folder(model, workspace))
            denoiser = loaded.description.kind == "denoiser"
            default = TEACHER_STEPS if denoiser else 1
            images = loaded.generate(range(num), steps=steps or default, seed=seed, label=label)
    except ValueError as error:
        raise UserError(f"sample: {error}") from error
    scale = png.tile_scale(int(images.shape[1]))
    with storage.mendable(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(png.encode_png(png.grid(images, min(10, num), scale=scale)))
    return out.resolve()


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


def _folder(model: str | None, workspace: str) -> tuple[Path, float | None]:
    """A model folder, and the second noise level it was evaluated with where that is known."""
    steps = ("teacher", "distill", "isolate")
    if model is not None and model not in steps:
        folder = Path(model)
        if not (folder / "weights.safetensors").is_file():
            raise UserError(
                f"{model}: no such model; give models:/NAME@ALIAS, a folder with "
                f"weights.safetensors and config.json, or one of {', '.join(steps)}"
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
    evaluated = _input(workspace, registered, "evaluate")
    scores = evaluated["value"]["scores"]
    two_steps = next(s for s in scores if s["candidate"] == candidate and s["steps"] == 2)
    return _files(workspace, _input(workspace, registered, candidate)), two_steps["sigmas"][1]


def _input(workspace: str, record: dict[str, Any], name: str) -> dict[str, Any]:
    """The record of one input of a recorded step."""
    from pipelines import dag

    inputs = {i["name"]: i["fingerprint"] for i in record["identity"]["inputs"]}
    return dag.read_record(storage.join(workspace, "steps", name, inputs[name]))


def _files(workspace: str, record: dict[str, Any]) -> Path:
    home = storage.join(workspace, "steps", record["step"], record["fingerprint"])
    return Path(storage.join(home, "attempts", record["attempt"]))
