"""A stage with two settings over several training seeds: is the difference more than their spread?

    python docs/seeds.py WORKSPACE OUT.json own=quickstart tuned=PATH/OF/recipe.yaml --seeds 0 1 2

WORKSPACE has finished shard, reference, teacher (and distill) steps of the recipes. Only the seed
of the stage differs: of its first weights, its noise and its order of images. Each is scored as
`evaluate` would, its first EMA, with the evaluation's own noise. What OUT.json has is not repeated.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from consistency.data import ImageStream
from consistency.evaluation.frechet import GaussianStats
from consistency.loop import train
from consistency.stage import begin, describe, finish
from infra import storage
from pipelines import dag, graph, shard_data
from pipelines.blocks import ITEM
from pipelines.config import load_cluster, load_recipe
from pipelines.recipe import Recipe
from pipelines.scoring import sample_part
from pipelines.yardstick import Yardstick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workspace")
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="+", metavar="NAME=RECIPE")
    parser.add_argument("--stage", default="isolate", choices=["isolate", "distill"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    for seed in arguments.seeds:
        for text in arguments.settings:
            name, _, path = text.partition("=")
            key = f"{name}/{seed}"
            if key not in results:
                recipe = load_recipe(path)
                results[key] = score(recipe, arguments.workspace, arguments.stage, seed)
                print(key, results[key], flush=True)
                arguments.out.write_text(json.dumps(results, indent=1))
    print(table(results))


def score(recipe: Recipe, workspace: str, name: str, seed: int) -> dict[str, list[float]]:
    """Distances of each seed block in one and two steps, in the metric's unit."""
    cluster = replace(load_cluster("laptop"), workspace=storage.absolute(workspace))
    lines = dag.plan(graph.build(recipe, cluster), cluster.workspace)
    done = {line.step.name: line.committed for line in lines}
    shard, reference = done["shard"], done["reference"]
    assert shard is not None, "run the recipe first"
    assert reference is not None, "run the recipe first"
    config = getattr(recipe, name)
    weights = None
    if config.uses_teacher:
        source = done["distill" if config.init == "distilled" else "teacher"]
        assert source is not None, "run the recipe first"
        weights = load_file(f"{source.url}/weights.safetensors")
    data = shard.value
    about = describe(
        config,
        network=recipe.network,
        noise=recipe.noise,
        size=data.size,
        channels=data.channels,
        class_names=data.class_names,
    )
    images = shard_data.load(f"{shard.url}/shards", data.manifest_sha256)
    labels = images.labels if about.num_classes > 0 else None
    stage = begin(about, config, seed=seed, teacher_weights=weights)
    stream = ImageStream(images.images, labels, seed, config.flip)
    for _ in train(stage.state, stage.objective, stream, config, teacher=stage.teacher, seed=seed):
        pass
    stage.description = replace(about, mid_sigma=recipe.evaluate.mid_sigma)
    model = finish(stage)
    yardstick = Yardstick.of(shard, reference)
    extractor, real = yardstick.network.load("cpu"), yardstick.statistics()
    size, blocks = recipe.evaluate.samples, recipe.evaluate.seed_blocks
    found: dict[str, list[float]] = {}
    for steps in (1, 2):
        for block in range(blocks):
            sums: GaussianStats | None = None
            for start in range(block * size, (block + 1) * size, ITEM):
                indices = range(start, min(start + ITEM, (block + 1) * size))
                part = sample_part(
                    model,
                    extractor,
                    indices,
                    judge=False,
                    steps=steps,
                    seed=recipe.evaluate.seed,
                )
                sums = part.stats if sums is None else sums.merge(part.stats)
            assert sums is not None
            found.setdefault(f"{steps}", []).append(yardstick.value(real, sums))
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: a row per setting, each seed's mean over its blocks, and the mean of those."""
    rows = [
        "| setting | one step, by seed | mean | two steps, by seed | mean |",
        "| --- " * 5 + "|",
    ]
    for name in dict.fromkeys(key.split("/")[0] for key in sorted(results)):
        own = [results[key] for key in sorted(results) if key.split("/")[0] == name]
        cells = [name]
        for steps in ("1", "2"):
            means = [statistics.fmean(one[steps]) for one in own]
            spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
            listed = " / ".join(f"{mean:.3f}" for mean in means)
            cells += [listed, f"{statistics.fmean(means):.3f}{spread}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
