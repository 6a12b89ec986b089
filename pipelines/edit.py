"""`cmforge edit TASK MODEL IMAGE`: zero-shot edits of an image file with any consistency model."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.errors import UserError
from pipelines import models, png
from pipelines.sample import levels_of

if TYPE_CHECKING:
    from consistency.published import PublishedModel

MAX_RESULTS = 1_000
MAX_FILE = 64 * 2**20  # bytes


def run(arguments: argparse.Namespace, workspace: str, tracking_uri: str) -> list[Path]:
    """Do what the command line asks; returns the files written. Raises UserError."""
    from consistency import image_edits
    from consistency.edit_presets import DEFAULT_STEPS

    task = arguments.task
    if not 1 <= arguments.num <= MAX_RESULTS:
        raise UserError(f"--num: {arguments.num} must be between 1 and {MAX_RESULTS}")
    if arguments.steps is not None and arguments.sigmas is not None:
        raise UserError("--sigmas: one evaluation at each of them; leave --steps out")
    sigmas = None if arguments.sigmas is None else levels_of(arguments.sigmas, "--sigmas")
    seeds = _seeds(arguments)
    files = _files(arguments)
    model = models.load(arguments.model, workspace, tracking_uri)
    with _mendable(task):
        setting = image_edits.Setting(
            sigmas=image_edits.levels(
                model.description,
                task,
                steps=DEFAULT_STEPS[task] if arguments.steps is None else arguments.steps,
                sigmas=sigmas,
                sigma=getattr(arguments, "sigma", None),
            ),
            seed=seeds[0],
            label=arguments.label,
        )
        if task == "interpolate":
            frames = arguments.frames
            images = image_edits.interpolate(model, seeds[1], frames, arguments.num, setting)
            scale = png.tile_scale(int(images.shape[1]))
            return _write(Path(arguments.out), png.grid(images, frames, scale=scale)[None])
        pixels, missing = _decoded(arguments, files, model)
        images = image_edits.edit_images(
            model,
            task,
            pixels[None],
            [arguments.num],
            setting,
            missing=None if missing is None else missing[None],
            factor=getattr(arguments, "factor", None),
        )
    return _write(Path(arguments.out), images)


def _seeds(arguments: argparse.Namespace) -> list[int]:
    if arguments.task != "interpolate":
        return [arguments.seed]
    try:
        first, second = (int(part) for part in arguments.seeds.split(","))
    except ValueError:
        raise UserError(f"--seeds: {arguments.seeds!r} is not two numbers, such as 1,2") from None
    if not 2 <= arguments.frames <= MAX_RESULTS // arguments.num:
        most = f"{MAX_RESULTS} divided by --num"
        raise UserError(f"--frames: {arguments.frames} must be between 2 and {most}")
    return [first, second]


def _files(arguments: argparse.Namespace) -> dict[str, bytes]:
    """The image, and the mask if there is one."""
    named = {"image": getattr(arguments, "image", None), "--mask": getattr(arguments, "mask", None)}
    return {what: _read(what, path) for what, path in named.items() if path is not None}


def _read(what: str, path: str) -> bytes:
    url = storage.absolute(path)
    if not storage.exists(url):
        raise UserError(f"{what}: {path} does not exist; check the spelling")
    with storage.mendable(path, what):
        if storage.size(url) > MAX_FILE:
            raise UserError(f"{what}: {path} is larger than {MAX_FILE >> 20} MiB; shrink it first")
        return storage.read_bytes(url)


def _decoded(
    arguments: argparse.Namespace, files: dict[str, bytes], model: "PublishedModel"
) -> tuple[Any, Any]:
    """(uint8 [H, W, C], bool [H, W] of what is missing or None), of the model's size."""
    from consistency.image_files import decode_image, decode_mask

    about, task = model.description, arguments.task
    with _mendable(arguments.image):
        pixels, missing = decode_image(files["image"], about.channels)
    if task == "inpaint":
        if "--mask" in files:
            with _mendable(arguments.mask):
                missing = decode_mask(files["--mask"])
        if missing.shape != pixels.shape[:2]:
            raise UserError(
                f"--mask: {arguments.mask} is {_size(missing)}, {arguments.image} "
                f"{_size(pixels)}; they must lie on each other"
            )
        if not missing.any():
            raise UserError(
                "edit inpaint: nothing is missing; give --mask with white where to fill in, or an "
                "image with transparent pixels"
            )
    if task == "superres":
        return pixels, None  # smaller than the model's, by a factor that is checked with it
    if pixels.shape[:2] != (about.size, about.size):
        if not arguments.resize:
            raise UserError(
                f"edit {task}: {arguments.image} is {_size(pixels)}, the model draws "
                f"{about.size}x{about.size}; --resize takes the centre square at that size"
            )
        pixels, missing = _resized(pixels, about.size), _resized_mask(missing, about.size)
    return pixels, missing if task == "inpaint" else None


def _resized(pixels: Any, size: int) -> Any:
    from infra.sources import fit_image

    return fit_image(pixels, size, "crop", "image")


def _resized_mask(missing: Any, size: int) -> Any:
    """Any part of a pixel missing makes it missing."""
    import numpy as np

    return _resized(missing.astype(np.uint8)[..., None] * 255, size)[..., 0] > 0


def _size(pixels: Any) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


@contextmanager
def _mendable(where: str) -> Iterator[None]:
    """What the library refuses, as a user's mistake."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error


def _write(out: Path, images: Any) -> list[Path]:
    """uint8 [n, H, W, C] to `out`, or for several images to out-1.png, out-2.png and so on."""
    paths = [out] if len(images) == 1 else [_numbered(out, i + 1) for i in range(len(images))]
    with storage.mendable(str(out), "--out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, images, strict=True):
            path.write_bytes(png.encode_png(image))
    return [path.resolve() for path in paths]


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")
