"""`cmforge sample`: a grid of images from a model of the workspace, a folder or the registry."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import UserError
from pipelines import models, png

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
            loaded = models.load(model, workspace, "")
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


def levels_of(text: str, option: str = "--levels") -> list[float]:
    """`80,0.8` as numbers. Raises UserError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: {text!r} is not a list of numbers, such as 80,0.8") from None


def _from_registry(model: str, uri: str, num: int, steps: int, seed: int, label: int | None) -> Any:
    from infra import tracking

    params = {"steps": steps, "seed": seed, "class": -1 if label is None else label}
    return tracking.predict(uri, model, num, {**params, "output": "uint8"})


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
