"""`cmforge sample`: a grid of images from a model of the workspace, a folder or the registry."""

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
            loaded = _load(_folder(model, workspace))
            denoiser = loaded.description.kind == "denoiser"
            default = TEACHER_STEPS if denoiser else 1
            images = loaded.generate(range(num), steps=steps or default, seed=seed, label=label)
    except ValueError as error:
        raise UserError(f"sample: {error}") from error
    scale = max(1, 40 // int(images.shape[1]))
    with storage.mendable(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(png.encode_png(png.grid(images, min(10, num), scale=scale)))
    return out.resolve()


def _from_registry(model: str, uri: str, num: int, steps: int, seed: int, label: int | None) -> Any:
    from infra import tracking

    params = {"steps": steps, "seed": seed, "class": -1 if label is None else label}
    return tracking.predict(uri, model, num, {**params, "output": "uint8"})


def _load(folder: Path) -> Any:
    from consistency import published

    try:
        return published.load(folder)
    except Exception as error:  # JSON, safetensors and torch each have their own for damage
        raise UserError(f"{folder} is not a whole model: {str(error).splitlines()[0]}") from error


def _folder(model: str | None, workspace: str) -> Path:
    """A model folder: one given, or the newest committed one of a step."""
    steps = ("teacher", "distill", "isolate")
    if model is not None and model not in steps:
        folder = Path(model)
        if not (folder / "weights.safetensors").is_file():
            raise UserError(
                f"{model}: no such model; give models:/NAME@ALIAS, a folder with "
                f"weights.safetensors and config.json, or one of {', '.join(steps)}"
            )
        return folder
    from pipelines import dag

    wanted = model
    if wanted is None:
        registered = dag.latest_record("register", workspace)
        if registered is None:
            raise UserError(f"no model in workspace {workspace} yet; run a recipe, or name a model")
        wanted = registered["value"]["candidate"]
    record = dag.latest_record(wanted, workspace)
    if record is None:
        raise UserError(f"step {wanted} has no result in workspace {workspace} yet; run a recipe")
    if not storage.is_local(workspace):
        raise UserError("sampling from a remote workspace: give the registered model, models:/...")
    home = storage.join(workspace, "steps", wanted, record["fingerprint"])
    return Path(storage.join(home, "attempts", record["attempt"]))
