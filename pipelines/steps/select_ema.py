"""select_ema: of a trained model's sampling EMAs, the one whose samples lie nearest real images.

Candidates are the EMAs that were trained and, where snapshots were kept, power EMAs of other widths
rebuilt from them (Sec. 3.2, EDM2).
"""

import json
import math
import shutil
from dataclasses import dataclass, replace
from functools import partial

from consistency.config import PowerEMA
from infra import storage
from pipelines.artifacts import Committed, ReferenceStats, ShardSet, TrainedModel
from pipelines.dag import StepContext
from pipelines.measuring import SelectConfig
from pipelines.scoring import Job, Subject, measure_in_step
from pipelines.yardstick import Yardstick

TABLE = "ema.json"


@dataclass(frozen=True, kw_only=True)
class SelectStage:
    """Identity of the step."""

    select: SelectConfig
    mid_sigma: float  # the evaluation's second level of two steps


def step_name(candidate: str) -> str:
    """The step that selects for a candidate: each has its own."""
    return f"select_ema-{candidate}"


def run(
    ctx: StepContext,
    config: SelectStage,
    shard: Committed[ShardSet],
    reference: Committed[ReferenceStats],
    trained: Committed[TrainedModel],
) -> TrainedModel:
    """The same model with the weights of its best EMA; `ema.json` says how every one scored.

    The lowest distance wins, a distance that is not finite comes last.
    """
    from consistency.published import ModelDescription

    select = config.select
    about = ModelDescription.from_json(ctx.fetch(trained, "config.json").read_text())
    about = replace(about, mid_sigma=config.mid_sigma)
    yardstick = Yardstick.of(shard, reference)
    protocol = yardstick.protocol(
        samples=select.samples,
        seed_blocks=1,
        seed=select.seed,
        steps=select.steps,
        allow_rank_deficient=select.allow_rank_deficient,
    )
    urls = _candidates(ctx, select, trained)
    assert len(urls) > 1, "the recipe sees to it"
    jobs = [
        Job(
            subject=Subject(
                name=name,
                description=about.to_json(),
                weights_url=url,
                weights_sha256=storage.sha256(url),
            ),
            protocol=protocol,
        )
        for name, url in urls.items()
    ]
    found = measure_in_step(ctx, yardstick, jobs)
    values = {name: one.values[0] for name, one in zip(urls, found, strict=True)}
    chosen = min(values, key=lambda name: (not math.isfinite(values[name]), values[name]))

    (ctx.out / "weights.safetensors").write_bytes(storage.read_bytes(urls[chosen]))
    for name in ("config.json", "curve.jsonl"):
        shutil.copyfile(ctx.fetch(trained, name), ctx.out / name)
    table = [
        {
            "name": name,
            "value": value if math.isfinite(value) else None,
            "chosen": name == chosen,
        }
        for name, value in values.items()
    ]
    (ctx.out / TABLE).write_text(json.dumps(table, indent=1))
    return replace(
        trained.value,
        weights_sha256=storage.sha256(str(ctx.out / "weights.safetensors")),
        ema=chosen,
        emas=(),
        snapshots=(),
    )


def _candidates(
    ctx: StepContext, config: SelectConfig, trained: Committed[TrainedModel]
) -> dict[str, str]:
    """Name of the EMA -> its weights, where evaluators find them; the rebuilt ones in `work`."""
    model = trained.value
    files = {model.ema: "weights.safetensors"}
    files |= {name: f"ema/{name}.safetensors" for name in model.emas}
    urls = {}
    for name, file in files.items():
        ctx.fetch(trained, file)  # checked against the record
        urls[name] = storage.join(trained.url, file)
    for sigma_rel in config.sigma_rel if model.snapshots else ():
        name = PowerEMA(sigma_rel=sigma_rel).name
        if name not in urls:
            urls[name] = storage.join(ctx.work, "rebuilt", f"{name}.safetensors")
            storage.write_bytes(urls[name], _rebuilt(ctx, trained, sigma_rel))
    return urls


def _rebuilt(ctx: StepContext, trained: Committed[TrainedModel], sigma_rel: float) -> bytes:
    """The power EMA of relative width `sigma_rel` at the end of training, from the snapshots."""
    from safetensors.torch import load_file, save

    from consistency.ema import gamma_from_sigma_rel, post_hoc_ema

    snapshots = []
    for snapshot in trained.value.snapshots:  # power-0.05-1200: of width 0.05, at step 1200
        name, _, step = snapshot.rpartition("-")
        gamma = gamma_from_sigma_rel(float(name.removeprefix("power-")))
        path = ctx.fetch(trained, f"snapshots/{snapshot}.safetensors")
        snapshots.append((float(step), gamma, partial(load_file, path)))
    steps = float(trained.value.steps)
    weights = post_hoc_ema(snapshots, steps, gamma_from_sigma_rel(sigma_rel))
    data: bytes = save({name: tensor.contiguous() for name, tensor in weights.items()})
    return data
