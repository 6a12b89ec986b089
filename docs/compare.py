"""The methods beside each other on scikit-learn's digits, at equal CPU time and with equal seeds.

python docs/compare.py OUT.json [--seeds 0 1 2] [--only ect cd ...] [--unit-steps 771]

The unit of cost is the CPU time of `unit-steps` steps of the teacher (one thread; 771 steps are a
minute on the machine where the expectations for it were measured). Every method gets one
unit after the teacher's, or two from scratch; how many of its own steps that is, is measured first,
interleaved, and kept in OUT.json. Settings are those of `configs/methods` on the quickstart recipe,
with the changes in METHODS. Runs already in OUT.json are not repeated.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistency.data import ImageStream
from consistency.evaluation.domain import FeatureNet, accuracy, extract, train_feature_net
from consistency.evaluation.frechet import GaussianStats, relative_frechet_percent
from consistency.loop import train
from consistency.stage import Stage, begin, describe, finish
from infra import sources
from pipelines.config import load_recipe
from pipelines.recipe import Recipe

SAMPLES = 2_000
TEACHER_STEPS = 18
CALIBRATION_STEPS = 12

# method -> (overrides on the quickstart recipe, units of budget, what its weights come from)
TUNE = ["isolate.lr=1e-3"]
SHORT = ["tangent_warmup_images=3_200", "P_std=1.8"]  # a network told ln(sigma) / 4
SECOND = [
    *["images=19_200", "batch=64", "optimizer=adam", "lr=1e-3", "betas=[0.9, 0.99]"],
    *["warmup_images=3_200", "decay_from=0.5", "ema=[{kind: power, sigma_rel: 0.10}]"],
]
METHODS: dict[str, tuple[list[str], float, str]] = {
    "ect": (["isolate.method=ect", *TUNE], 1, "teacher"),
    "cd": ([], 1, "teacher"),  # the quickstart's distill
    "ict": (["isolate.pairs.levels.s1=160"], 2, "scratch"),
    "sct": (["isolate.method=sct", *TUNE, *(f"isolate.{o}" for o in SHORT)], 1, "teacher"),
    "scd": (["distill.method=scd", *(f"distill.{o}" for o in SHORT)], 1, "teacher"),
    "mean-flow": (["isolate.method=mean-flow"], 2, "scratch"),
    "tcm": (
        ["isolate.method=ect", *TUNE, "truncate.method=tcm", *(f"truncate.{o}" for o in SECOND)],
        0.5,
        "ect-half",
    ),
    "ect-1hour": (["isolate.method=ect-1hour", *TUNE], 1, "teacher"),
    "ct-2023": (["isolate.method=ct-2023"], 2, "scratch"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="+", help="one file; with --table, all of them")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--unit-steps", type=int, default=771)
    parser.add_argument("--table", action="store_true", help="print what is in the files")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(path.read_text()) for path in arguments.out]))
        return
    torch.set_num_threads(1)
    comparison = Comparison(arguments.out[0], arguments.unit_steps)
    comparison.calibrate()
    for seed in arguments.seeds:
        for method in arguments.only:
            comparison.run(method, seed)


def table(files: list[dict[str, Any]]) -> str:
    """Markdown: one row per method, the seeds' scores in their order."""
    merged = {key: value for results in files for key, value in results.items() if "/" in key}
    rows = [
        "| method | steps | CPU-s | one step, % | in class | two steps, % | in class |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        runs = [merged[key] for key in sorted(merged) if key.split("/")[0] == method]
        if runs:
            cells = [
                str(runs[0]["steps"]),
                " / ".join(f"{run['cpu_seconds']:.0f}" for run in runs),
                *(
                    " / ".join(f"{run[count][key]:.2f}" for run in runs)
                    for count in ("1 step", "2 step")
                    for key in ("percent", "agreement")
                ),
            ]
            rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


class Comparison:
    """Data, yardstick and the results so far."""

    def __init__(self, out: Path, unit_steps: int) -> None:
        self.out, self.unit_steps = out, unit_steps
        self.results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        source = sources.open_source("digits", None, size=None, fit="crop")
        records = list(source.samples())
        self.images = np.stack([image for image, _ in records])
        self.labels = np.array([label for _, label in records])
        self.class_names = source.class_names
        self.net: FeatureNet = train_feature_net(
            self.images, self.labels, len(self.class_names), steps=300, seed=0
        )
        features = extract(self.net, self.images)
        self.reference = GaussianStats.from_features(features)
        halves = [GaussianStats.from_features(features[n::2]) for n in (0, 1)]
        self.results["halves_percent"] = round(relative_frechet_percent(*halves), 3)
        self.weights: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def calibrate(self) -> None:
        """CPU seconds per step of each method, in the middle of three interleaved rounds."""
        if "seconds_per_step" in self.results:
            return
        names = ["teacher", *METHODS]
        rounds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(3):
            for name in names:
                weights = build_weights(self, name)
                stage = self.stage(name, 0, CALIBRATION_STEPS, weights)
                stamps = [time.process_time() for _ in self.train(stage, 0)]
                rounds[name].append((stamps[-1] - stamps[1]) / (len(stamps) - 2))
        self.results["seconds_per_step"] = {
            name: round(statistics.median(values), 4) for name, values in rounds.items()
        }
        print(self.results["seconds_per_step"], flush=True)
        self.save()

    def run(self, method: str, seed: int) -> None:
        """Train one method from one seed (its teacher first) and score it."""
        key = f"{method}/{seed}"
        if key in self.results:
            return
        _, units, start = METHODS[method]
        weights = None if start == "scratch" else self.start(start, seed)
        steps = self.steps(method, units)
        stage = self.stage(method, seed, steps, weights)
        began = time.process_time()
        for _ in self.train(stage, seed):
            pass
        seconds = time.process_time() - began
        self.results[key] = {"steps": steps, "cpu_seconds": round(seconds, 1)}
        for count in (1, 2):
            self.results[key][f"{count} step"] = self.score(stage, count)
        print(key, self.results[key], flush=True)
        self.save()

    def start(self, name: str, seed: int) -> dict[str, torch.Tensor]:
        """Weights that a method begins with: the teacher's, or half a unit of ECT from those."""
        if (name, seed) not in self.weights:
            if name == "teacher":
                stage = self.stage("teacher", seed, self.unit_steps, None)
            else:
                weights = self.start("teacher", seed)
                stage = self.stage("ect", seed, self.steps("ect", 0.5), weights)
            for _ in self.train(stage, seed):
                pass
            self.weights[name, seed] = stage.state.averages[stage.config.ema[0].name]
            if name == "teacher":
                score = self.score(stage, TEACHER_STEPS)
                self.results[f"teacher/{seed}"] = {
                    "steps": self.unit_steps,
                    "35 evaluations": score,
                }
                print(f"teacher/{seed}", score, flush=True)
        return self.weights[name, seed]

    def steps(self, method: str, units: float) -> int:
        cost = self.results["seconds_per_step"]
        return round(units * self.unit_steps * cost["teacher"] / cost[method])

    def stage(
        self, method: str, seed: int, steps: int, weights: dict[str, torch.Tensor] | None
    ) -> Stage:
        overrides = [] if method == "teacher" else METHODS[method][0]
        recipe = load_recipe("quickstart", overrides)
        config: Any = stage_config(recipe, method)
        images = steps * config.batch
        config = replace(
            config, images=images, warmup_images=min(config.warmup_images, images // 4)
        )
        about = describe(
            config,
            network=recipe.network,
            noise=recipe.noise,
            size=self.images.shape[1],
            channels=self.images.shape[3],
            class_names=self.class_names,
        )
        return begin(about, config, seed=seed, teacher_weights=weights)

    def train(self, stage: Stage, seed: int) -> Any:
        stream = ImageStream(self.images, self.labels, seed)
        return train(
            stage.state, stage.objective, stream, stage.config, teacher=stage.teacher, seed=seed
        )

    def score(self, stage: Stage, steps: int) -> dict[str, float]:
        """fd_domain in percent and class agreement of 2,000 samples of the first sampling EMA."""
        images = finish(stage).generate(range(SAMPLES), steps=steps, seed=0)
        asked = np.arange(SAMPLES) % len(self.class_names)
        stats = GaussianStats.from_features(extract(self.net, images))
        return {
            "percent": round(relative_frechet_percent(stats, self.reference), 3),
            "agreement": round(accuracy(self.net, images, asked), 3),
        }

    def save(self) -> None:
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")


def stage_config(recipe: Recipe, method: str) -> Any:
    if method == "teacher":
        return recipe.teacher
    if method == "tcm":
        return recipe.truncate
    return recipe.distill if method in ("cd", "scd") else recipe.isolate


def build_weights(comparison: Comparison, method: str) -> dict[str, torch.Tensor] | None:
    """Untrained weights, good enough to time a method that starts from a teacher."""
    if method == "teacher" or METHODS[method][2] == "scratch":
        return None
    return comparison.stage("teacher", 0, CALIBRATION_STEPS, None).state.net.state_dict()


if __name__ == "__main__":
    main()
