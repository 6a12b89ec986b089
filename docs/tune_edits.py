"""Tunes the noise levels of `consistency/edit_presets.py` on real images with a trained model.

python docs/tune_edits.py MODEL IMAGES OUT.json [--labels LABELS.npy] [--workspace W]
python docs/tune_edits.py --table OUT.json ...

IMAGES: uint8 .npy [N, H, W, C], or `digits` (scikit-learn's, with their labels). Each image is
damaged (its right half or its centre cut out, pixels averaged, colour taken away, noise added) and
restored with levels on a Karras grid between `high` and `low`; the score is the RMSE of what was
restored to the real image, in [-1, 1] units. Candidates share their noise. Of colours the RMSE
alone would choose grey: candidates whose tint (RMS of the images' mean colour) is below 0.8 of the
real images' are out. A stroke has no right
answer: for it the RMSE to the guide stands beside the distance of the results to real images.
"""

import argparse
import json
import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency import editing
from consistency.evaluation.domain import extract, train_feature_net
from consistency.evaluation.frechet import GaussianStats, relative_frechet_percent
from consistency.published import PublishedModel
from consistency.sampling import from_uint8, sample_noise, to_uint8
from consistency.schedules import karras_sigmas
from pipelines import models

HIGH = (80.0, 30.0, 12.0, 5.0, 2.0, 1.0)
LOW = (2.0, 1.0, 0.5, 0.25, 0.12)
STEPS = (1, 2, 4, 8)
STROKES = (0.1, 0.17, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 5.38)
NOISES = (0.25, 0.5, 1.0)
TASKS = ("inpaint", "superres", "colorize", "denoise", "stroke")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arguments", nargs="+", metavar="MODEL IMAGES OUT.json")
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--workspace", default="cmforge-workspace")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--table", action="store_true", help="print what is in the files")
    given = parser.parse_args()
    if given.table:
        print(table([json.loads(Path(path).read_text()) for path in given.arguments]))
        return
    name, images, out = given.arguments
    pixels, labels = read(images, given.labels, given.limit)
    model = models.load(name, given.workspace, "")
    results = Bench(model, from_uint8(torch.from_numpy(pixels)), labels).run(given.tasks)
    Path(out).write_text(json.dumps(results, indent=1) + "\n")


def read(images: str, labels: Path | None, limit: int) -> tuple[np.ndarray[Any, Any], Any]:
    """So many images, evenly over the file."""
    if images == "digits":
        from infra import sources

        pairs = list(sources.open_source("digits", None, size=None, fit="crop").samples())
        pixels, classes = np.stack([image for image, _ in pairs]), [label for _, label in pairs]
    else:
        pixels = np.load(images)
        classes = np.zeros(len(pixels), np.int64) if labels is None else np.load(labels)
    picked = np.linspace(0, len(pixels) - 1, min(limit, len(pixels))).astype(int)
    return np.ascontiguousarray(pixels[picked]), torch.tensor(np.asarray(classes)[picked])


class Bench:
    """A model, real images [N, C, H, W] and the levels tried on them."""

    def __init__(self, model: PublishedModel, x: Tensor, labels: Tensor) -> None:
        self.model, self.x, self.labels = model, x, labels
        self.about = model.description
        if self.about.num_classes == 0:
            self.labels = None
        self.shape = tuple(x.shape[1:])
        self.factor = 2 if self.about.size < 16 else 4

    def run(self, asked: list[str]) -> dict[str, Any]:
        size, results = self.about.size, {}
        cut = torch.zeros(1, 1, size, size)
        cut[..., size // 2 :] = 1
        centre = torch.zeros(1, 1, size, size)
        centre[..., size // 4 : -(size // 4), size // 4 : -(size // 4)] = 1
        small = torch.nn.functional.avg_pool2d
        tasks = {
            "inpaint half": editing.inpainting(self.x, cut),
            "inpaint centre": editing.inpainting(self.x, centre),
            "superres": editing.super_resolution(small(self.x, self.factor), self.factor),
        }
        if self.shape[0] == 3:
            luma = editing.Channels()
            grey = luma.forward(self.x)[:, :1] / luma.forward(torch.ones_like(self.x))[:, :1]
            tasks["colorize"] = editing.colorization(grey)
        for task, known in tasks.items():
            if task.split()[0] not in asked:
                continue
            began = time.monotonic()
            results[task] = self.search(known)
            print(f"{time.monotonic() - began:.0f} s", task, best(results[task]), flush=True)
        if "denoise" in asked:
            results["denoise"] = self.denoising()
        if "stroke" in asked:
            results["stroke"] = self.strokes()
        return results

    def search(self, known: editing.Known) -> dict[str, float]:
        """RMSE over what is free by "steps high low"; "paper" is the Karras grid of 40."""
        free = editing_error(known, self.x)
        found = {}
        for steps, high, low in product(STEPS, HIGH, LOW):
            if low >= high or (steps == 1 and low != LOW[0]):
                continue
            x = self.edit(known, levels(steps, high, low))
            grey = isinstance(known.transform, editing.Channels) and self.tint(x) < 0.8
            found[f"{steps} {high:g} {low:g}"] = math.inf if grey else free(x)
        grid = karras_sigmas(40, self.about.noise.sigma_min, 80.0).flip(0).tolist()
        found["paper"] = free(self.edit(known, grid))
        for steps in STEPS[1:]:  # what sampling would use
            found[f"{steps} sampling"] = free(self.edit(known, self.about.sigmas(steps)))
        return found

    def tint(self, x: Tensor) -> float:
        """RMS of the images' mean colour beside their luma, relative to the real images'."""
        found, real = (
            editing.Channels().forward(images)[:, 1:].mean(dim=(2, 3)).square().mean().sqrt()
            for images in (x, self.x)
        )
        return (found / real).item()

    def edit(self, known: editing.Known, sigmas: list[float], start: Any = None) -> Tensor:
        return editing.edit(
            self.model.function,
            self.noise,
            known.y,
            sigmas,
            known.transform,
            known.mask,
            self.labels,
            sigma_min=self.about.boundary,
            start=start,
        )

    def noise(self, draw: int) -> Tensor:
        return sample_noise(0, range(len(self.x)), self.shape, draw)

    def denoising(self) -> dict[str, float]:
        """RMSE by "sigma steps share"; levels from sigma down to share sigma."""
        found = {}
        for sigma in NOISES:
            noisy = self.x + sigma * self.noise(1000)
            for steps, share in [(1, 1.0), *product(STEPS[1:], (0.7, 0.5, 0.3, 0.1))]:
                at = levels(steps, sigma, share * sigma)
                x = self.edit(editing.nothing(noisy), at, noisy)
                found[f"{sigma:g} {steps} {share:g}"] = rmse(x - self.x)
        return found

    def strokes(self) -> dict[str, list[float]]:
        """[RMSE to the guide, Frechet distance in percent] by "sigma" or "sigma second"."""
        labels = np.zeros(len(self.x), np.int64) if self.labels is None else self.labels.numpy()
        pixels = to_uint8(self.x).numpy()
        net = train_feature_net(pixels, labels, int(labels.max()) + 1, steps=300, seed=0)
        real = GaussianStats.from_features(extract(net, pixels))

        def score(x: Tensor) -> list[float]:
            stats = GaussianStats.from_features(extract(net, to_uint8(x).numpy()))
            return [rmse(x - guide), round(relative_frechet_percent(stats, real), 2)]

        guide = rough(self.x)
        found = {"guide": score(guide)}
        for sigma in STROKES:
            for sigmas in ([sigma], [sigma, sigma * 2.24 / 5.38]):
                start = guide + sigma * self.noise(0)
                x = self.edit(editing.nothing(guide), sigmas, start)
                found[" ".join(f"{s:.3g}" for s in sigmas)] = score(x)
        return found


def rough(x: Tensor) -> Tensor:
    """A guide as a hand would paint it: patches of one of four levels per channel."""
    p = max(2, x.shape[-1] // 8)
    flat = torch.nn.functional.avg_pool2d(x, p).mul(1.5).round().div(1.5).clamp(-1, 1)
    return flat.repeat_interleave(p, 2).repeat_interleave(p, 3)


def levels(steps: int, high: float, low: float) -> list[float]:
    return [high] if steps == 1 else karras_sigmas(steps, low, high).flip(0).tolist()


def editing_error(known: editing.Known, truth: Tensor) -> Any:
    """The RMSE per free coefficient: a fair scale, as the known ones are always right."""
    shape = known.transform.forward(truth).shape
    share = known.mask.expand(shape).float().mean().item()
    return lambda x: rmse((x - truth) / math.sqrt(share))


def rmse(difference: Tensor) -> float:
    return round(difference.square().mean().sqrt().item(), 4)


def best(found: dict[str, float]) -> dict[str, Any]:
    """Per number of steps the best ends and their RMSE."""
    chosen: dict[str, Any] = {"paper": found["paper"]}
    for steps in STEPS:
        tried = {k: v for k, v in found.items() if k.startswith(f"{steps} ")}
        key = min(tried, key=tried.__getitem__)
        chosen[key] = tried[key]
        if f"{steps} sampling" in found:
            chosen[f"{steps} sampling"] = found[f"{steps} sampling"]
    return chosen


def table(files: list[dict[str, Any]]) -> str:
    """Per task and number of steps: the best common ends, and per run the RMSE they reach.

    Best: over a task's runs in all files, the largest RMSE / lowest RMSE of the run is lowest.
    """
    lines = []
    for task in ("inpaint", "superres", "colorize"):
        runs = [found for file in files for name, found in file.items() if name.startswith(task)]
        for steps in STEPS if runs else ():
            key = common_best(runs, steps)
            errors = "  ".join(f"{run[key]:.3f}" for run in runs)
            lines.append(f"{task:<9} {key:<14} {errors}")
        for key in ("8 sampling", "paper") if runs else ():
            errors = "  ".join(f"{run[key]:.3f}" for run in runs)
            lines.append(f"{task:<9} {key:<14} {errors}")
    return "\n".join(lines)


def common_best(runs: list[dict[str, float]], steps: int) -> str:
    keys = [key for key in runs[0] if key.startswith(f"{steps} ") and "sampling" not in key]
    lowest = [min(run[key] for key in keys) for run in runs]
    return min(keys, key=lambda k: max(r[k] / low for r, low in zip(runs, lowest, strict=True)))


if __name__ == "__main__":
    main()
