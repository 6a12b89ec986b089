"""select_ema: of a trained model's sampling EMAs, the one whose samples lie nearest real images.

Candidates are the EMAs that were trained and, where snapshots were kept, power EMAs of other widths
rebuilt from them (Sec. 3.2, EDM2).
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from consistency.config import PowerEMA
from pipelines.artifacts import Committed, ReferenceStats, ShardSet, TrainedModel
from pipelines.dag import StepContext
from pipelines.recipe import SelectConfig

if TYPE_CHECKING:
    from torch import Tensor

    Load = Callable[[], dict[str, Tensor]]

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

    The lowest percent wins, a distance that is not finite comes last.
    """
    import torch
    from safetensors.torch import save

    from consistency import published
    from infra import storage
    from pipelines.yardstick import Yardstick

    candidates = _candidates(ctx, config.select, trained)
    assert len(candidates) > 1, "the recipe sees to it"
    torch.set_num_threads(1)  # the one CPU this step holds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yardstick = Yardstick(ctx, shard, reference, device)
    about = published.ModelDescription.from_json(ctx.fetch(trained, "config.json").read_text())
    about = replace(about, mid_sigma=config.mid_sigma)

    percents: dict[str, float] = {}
    for name, load in candidates.items():
        model = published.build(about, load())
        model.function.to(device)
        _, percents[name], _, _ = yardstick.measure(
            model, config.select.samples, steps=config.select.steps, seed=config.select.seed
        )
    chosen = min(percents, key=lambda name: (not math.isfinite(percents[name]), percents[name]))

    data = save({name: tensor.contiguous() for name, tensor in candidates[chosen]().items()})
    (ctx.out / "weights.safetensors").write_bytes(data)
    for name in ("config.json", "curve.jsonl"):
        shutil.copyfile(ctx.fetch(trained, name), ctx.out / name)
    table = [
        {
            "name": name,
            "percent": percent if math.isfinite(percent) else None,
            "chosen": name == chosen,
        }
        for name, percent in percents.items()
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
) -> "dict[str, Load]":
    """Weights by name of the EMA, read or rebuilt when they are called for."""
    model = trained.value
    candidates: dict[str, Load] = {model.ema: partial(_read, ctx, trained, "weights")}
    for name in model.emas:
        candidates[name] = partial(_read, ctx, trained, f"ema/{name}")
    for sigma_rel in config.sigma_rel if model.snapshots else ():
        name = PowerEMA(sigma_rel=sigma_rel).name
        if name not in candidates:
            candidates[name] = partial(_rebuilt, ctx, trained, sigma_rel)
    return candidates


def _read(ctx: StepContext, trained: Committed[TrainedModel], name: str) -> "dict[str, Tensor]":
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = load_file(ctx.fetch(trained, f"{name}.safetensors"))
    return weights


def _rebuilt(
    ctx: StepContext, trained: Committed[TrainedModel], sigma_rel: float
) -> "dict[str, Tensor]":
    """The power EMA of relative width `sigma_rel` at the end of training, from the snapshots."""
    from consistency.ema import gamma_from_sigma_rel, post_hoc_ema

    snapshots = []
    for snapshot in trained.value.snapshots:  # power-0.05-1200: of width 0.05, at step 1200
        name, _, step = snapshot.rpartition("-")
        gamma = gamma_from_sigma_rel(float(name.removeprefix("power-")))
        load = partial(_read, ctx, trained, f"snapshots/{snapshot}")
        snapshots.append((float(step), gamma, load))
    return post_hoc_ema(snapshots, float(trained.value.steps), gamma_from_sigma_rel(sigma_rel))
