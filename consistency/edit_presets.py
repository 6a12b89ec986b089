"""Noise levels of the edits: the paper's for a full budget, tuned ones for a few evaluations.

The tuned ends were found by `docs/tune_edits.py` on real images with a trained model;
docs/editing.md says on which, and what they gain.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

from consistency.schedules import karras_sigmas

Task = Literal["inpaint", "colorize", "superres", "stroke", "denoise", "interpolate"]
TASKS: tuple[Task, ...] = get_args(Task)

FULL = 40  # evaluations of Algorithm 4 in the paper, on the Karras grid of so many points

DEFAULT_STEPS: Mapping[Task, int] = {
    "inpaint": 8,
    "colorize": 8,
    "superres": 8,
    "stroke": 2,
    "denoise": 1,
    "interpolate": 1,
}

# steps -> (first level, last level) of images of 16 pixels; those between lie on a Karras grid.
TUNED: Mapping[str, Mapping[int, tuple[float, float]]] = {
    "inpaint": {1: (5.0, 5.0), 2: (2.0, 1.0), 4: (2.0, 0.5), 8: (1.0, 0.5)},
    "colorize": {1: (5.0, 5.0), 2: (2.0, 0.5), 4: (1.0, 0.12), 8: (1.0, 0.12)},
    "superres": {1: (5.0, 5.0), 2: (1.0, 0.25), 4: (1.0, 0.25), 8: (1.0, 0.12)},
}
TUNED_SIZE = 16

STROKE, STROKE_SIZE = (5.38, 2.24), 256  # the paper's, and the size of its images
DENOISE_LAST = 0.1  # of the noise in the image: the last level, where there are several


def preset(
    task: str,
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    *,
    rho: float = 7.0,
    size: int = 256,
    sigma: float | None = None,
) -> list[float]:
    """`steps` decreasing noise levels within [sigma_min, sigma_max], for 1 to 40 evaluations of f.

    size: side of the images in pixels. Averaging s x s pixels divides noise by s, so what is large
    in a larger image takes a higher first level to draw: above 16 pixels those of inpainting and
    colours grow with it (superres has only patches to fill). Strokes go with the square root from
    the 0.95 tuned at 8 pixels to the paper's 5.38 at 256. sigma: for denoising, the noise in the
    image, which comes first. Raises ValueError where no such levels exist.
    """
    if task not in TASKS:
        raise ValueError(f"{task!r} is no edit; there are {', '.join(TASKS)}")
    if not 1 <= steps <= FULL:
        raise ValueError(
            f"{task}: {steps} steps are not in 1 to {FULL}; give the levels themselves"
        )
    if task == "denoise" and sigma is None:
        raise ValueError("denoise: needs sigma, the noise in the image")
    if task == "interpolate":
        grid = karras_sigmas(steps + 1, sigma_min, sigma_max, rho).flip(0)
        return [float(level) for level in grid[:-1]]
    if task == "stroke":
        first, last = (level * math.sqrt(size / STROKE_SIZE) for level in STROKE)
    elif task == "denoise":
        assert sigma is not None
        first, last = sigma, DENOISE_LAST * sigma
    else:
        first, last = _ends(TUNED[task], steps, sigma_min, sigma_max)
        first *= 1 if task == "superres" else max(1, size / TUNED_SIZE)
        first *= max(1, sigma_min / last)  # of a model that knows high levels only
    first = first if task == "denoise" else min(first, sigma_max)
    last = max(last, sigma_min)
    if not sigma_min <= first <= sigma_max or (steps > 1 and last >= first):
        raise ValueError(
            f"{task}: {steps} step(s) from {first:g} do not fit into this model's levels, "
            f"{sigma_min:g} to {sigma_max:g}"
        )
    if steps == 1:
        return [first]
    return [float(level) for level in karras_sigmas(steps, last, first, rho).flip(0)]


def _ends(
    tuned: Mapping[int, tuple[float, float]], steps: int, sigma_min: float, sigma_max: float
) -> tuple[float, float]:
    """Between two tuned numbers of steps on a line of logarithms; at 40 the whole range."""
    ends = {**tuned, FULL: (sigma_max, sigma_min)}
    if steps in ends:
        return ends[steps]
    below = max(n for n in ends if n < steps)
    above = min(n for n in ends if n > steps)
    share = math.log(steps / below) / math.log(above / below)
    first, last = (
        low ** (1 - share) * high**share for low, high in zip(ends[below], ends[above], strict=True)
    )
    return first, last
