"""The edits of a published model on 8-bit images: what the command line and a served model share.

Result j of an image depends on the seed, j and the settings alone: not on the other images of the
request, nor on how they are cut into batches. Raises ValueError for what cannot be done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from consistency import editing
from consistency.edit_presets import Task, preset
from consistency.published import ModelDescription, PublishedModel
from consistency.sampling import Noise, from_uint8, sample_noise, to_uint8

Pixels = npt.NDArray[np.uint8]
Begin = Callable[[slice, Noise], tuple[editing.Known, Tensor | None, Noise]]
"""(which results, their noise) -> what is known of them, f's first input if given, the noise."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an edit has beside its images."""

    sigmas: Sequence[float]  # as `levels` gives them
    seed: int = 0
    label: int | None = None  # None: of result j, class j mod num_classes
    batch: int = 250


def levels(
    about: ModelDescription,
    task: Task,
    *,
    steps: int,
    sigmas: Sequence[float] | None = None,
    sigma: float | None = None,
) -> list[float]:
    """The levels asked for, else the preset of this task, model and number of steps.

    sigma: of denoising, the noise in the image, which is the first level.
    """
    if about.kind != "consistency":
        kind = {"denoiser": "a diffusion model", "mean_flow": "a MeanFlow"}[about.kind]
        raise ValueError(f"an edit needs a consistency model, f(x, sigma); this is {kind}")
    if task == "denoise" and (sigma is None) == (sigmas is None):
        raise ValueError("denoise: give the noise in the image (sigma), or all levels (sigmas)")
    if task != "denoise" and sigma is not None:
        raise ValueError(f"sigma: how noisy the image is; {task} has no use for it")
    lowest, highest = max(about.boundary, about.lowest_sigma), about.noise.sigma_max
    if sigmas is None and task == "interpolate":
        if steps < 1:
            raise ValueError(f"steps: {steps} must be at least 1")
        return about.sigmas(steps)
    if sigmas is None:
        lowest = max(lowest, about.noise.sigma_min)
        return preset(task, steps, lowest, highest, size=about.size, sigma=sigma)
    editing.check_levels(sigmas, lowest, highest)
    if task == "interpolate" and sigmas[0] != highest:
        raise ValueError(f"interpolate: levels begin with {highest:g}, where all is noise")
    return list(sigmas)


def edit_images(
    model: PublishedModel,
    task: Task,
    images: Pixels,
    counts: Sequence[int],
    setting: Setting,
    *,
    missing: npt.NDArray[np.bool_] | None = None,
    factor: int | None = None,
) -> Pixels:
    """counts[r] results for images[r], in this order: [sum(counts), H, W, C] uint8.

    images: [R, H, W, C] of the model's size and channels; for superres smaller by `factor`, which
    may then be left out, or of the model's size with the factor. missing: for inpaint, [R, H, W].
    """
    about = model.description
    if task == "colorize" and about.channels != 3:
        raise ValueError("colorize: needs a model of colour images; this one draws grey ones")
    factor = fitting_factor(about, images, factor) if task == "superres" else 1
    if len(images) > 0 and images.shape[1] < about.size:
        images = images.repeat(factor, 1).repeat(factor, 2)
    if images.shape[1:] != (about.size, about.size, about.channels):
        raise ValueError(f"{task}: images are {_shape(images)}, the model's {_shape_of(about)}")
    if task == "inpaint" and (missing is None or missing.shape != images.shape[:3]):
        raise ValueError("inpaint: needs a mask of the image's size")
    _check_class(model, setting.label, counts)
    y = from_uint8(torch.from_numpy(np.array(images))).to(_device(model))
    free = None if missing is None else torch.from_numpy(missing)[:, None]
    row = np.repeat(np.arange(len(images)), counts)

    def begin(part: slice, noise: Noise) -> tuple[editing.Known, Tensor | None, Noise]:
        image, start = y[row[part]], None
        known = editing.nothing(image)
        if task == "inpaint":
            assert free is not None
            known = editing.inpainting(image, free[row[part]])
        elif task == "colorize":
            known = editing.colorization(image)
        elif task == "superres":
            known = editing.patch_means(image, factor)
        elif task == "stroke":
            start = image + setting.sigmas[0] * noise(0)
        else:
            start = image  # denoise: the noise is in it
        return known, start, noise

    return _run(model, [j for count in counts for j in range(count)], setting, begin)


def interpolate(
    model: PublishedModel, to_seed: int, frames: int, num: int, setting: Setting
) -> Pixels:
    """`num` rows of `frames` images: from sample j of `setting.seed` to sample j of `to_seed`."""
    if frames < 2:
        raise ValueError(f"frames: {frames} must be at least 2, the two ends")
    _check_class(model, setting.label, [num])
    indices = [j for j in range(num) for _ in range(frames)]
    along = torch.linspace(0, 1, frames, dtype=torch.float64).repeat(num)

    def begin(part: slice, noise: Noise) -> tuple[editing.Known, Tensor | None, Noise]:
        other = _noise(model, to_seed, indices[part])
        return editing.nothing(noise(0)), None, editing.slerp_noise(noise, other, along[part])

    return _run(model, indices, setting, begin)


def fitting_factor(about: ModelDescription, images: Pixels, factor: int | None) -> int:
    """The super-resolution from these images to the model's size."""
    height, width = images.shape[1:3]
    found = about.size // max(1, height)
    if height != width or found * height != about.size:
        raise ValueError(
            f"superres: {height}x{width} is no whole fraction of the model's "
            f"{about.size}x{about.size}"
        )
    if factor is None and found == 1:
        raise ValueError("superres: the image has the model's size; give the factor")
    if factor is not None and (factor < 1 or about.size % factor or found not in (1, factor)):
        raise ValueError(
            f"superres: factor {factor} does not lead from {height}x{width} to "
            f"{about.size}x{about.size}"
        )
    return found if factor is None else factor


def _run(model: PublishedModel, indices: Sequence[int], setting: Setting, begin: Begin) -> Pixels:
    """All results, `setting.batch` at a time."""
    about, results = model.description, []
    for at in range(0, len(indices), setting.batch):
        part = slice(at, at + setting.batch)
        labels = model.labels(indices[part], setting.label)
        known, start, noise = begin(part, _noise(model, setting.seed, indices[part]))
        x = editing.edit(
            model.function,
            noise,
            known.y,
            setting.sigmas,
            known.transform,
            known.mask,
            None if labels is None else labels.to(_device(model)),
            sigma_min=about.boundary,
            sigma_max=about.noise.sigma_max,
            start=start,
        )
        results.append(to_uint8(x).cpu().numpy())
    return np.concatenate(results)


def _noise(model: PublishedModel, seed: int, indices: Sequence[int]) -> Noise:
    about = model.description
    shape = (about.channels, about.size, about.size)
    return lambda draw: sample_noise(seed, indices, shape, draw, _device(model))


def _device(model: PublishedModel) -> torch.device:
    return next(model.function.parameters()).device


def _check_class(model: PublishedModel, label: int | None, counts: Sequence[int]) -> None:
    """One result of "all classes in turn" would be class 0, whatever the image shows."""
    about = model.description
    if label is None and about.num_classes > 0 and max(counts) == 1:
        shown = ", ".join(about.class_names[:3])
        raise ValueError(
            f"class: this model draws by class; give 0 to {about.num_classes - 1} ({shown}, ...), "
            f"or ask for more than one result to see classes in turn"
        )
    if label is not None and not 0 <= label < about.num_classes:
        raise ValueError(f"class: {label} is not one of this model's {about.num_classes} classes")


def _shape(images: Pixels) -> str:
    height, width, channels = images.shape[1:]
    return f"{height}x{width} with {channels} channel(s)"


def _shape_of(about: ModelDescription) -> str:
    return f"{about.size}x{about.size} with {about.channels}"
