"""What a sweep hands to its stage: a recipe delta, and the winner itself where it is whole."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import yaml

from consistency.config import EMAConfig
from infra import storage
from pipelines import config as configs
from pipelines import training
from pipelines.artifacts import Committed, ShardSet, TrainedModel, Tuned, from_json
from pipelines.dag import StepContext, read_record
from pipelines.training import StageConfig, files_of
from pipelines.trial import home_of

RECIPE, DELTA = "recipe.yaml", "delta.yaml"


def delta_yaml(settings: Sequence[str]) -> str:
    """Overrides as the part of a recipe that they change; values stand as they were written."""
    tree: dict[str, Any] = {}
    for text in settings:
        dotted, _, value = text.partition("=")
        *folders, last = (part.strip() for part in dotted.split("."))
        branch = tree
        for name in folders:
            if isinstance(branch.get(name), str):  # a mapping in one line, of which a key is set
                branch[name] = _opened(branch[name])
            branch = branch.setdefault(name, {})
        branch[last] = value.strip()
    return "".join(f"{line}\n" for line in _lines(tree, ""))


def _opened(text: str) -> dict[str, str]:
    """`{kind: ema, mu: 0.9}` as its entries."""
    entries = yaml.safe_load(text)
    assert isinstance(entries, dict), f"{text} has keys, so it is a mapping"
    return {key: _flow(value) for key, value in entries.items()}


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()  # which PyYAML puts behind a scalar


def ema_text(emas: Sequence[EMAConfig]) -> str:
    """Sampling EMAs as the value of an override."""
    return _flow([asdict(ema) for ema in emas])


def _lines(tree: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, str):
            yield f"{indent}{key}: {value}"
        else:
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")


def run_stage(
    ctx: StepContext,
    config: StageConfig,
    shard: Committed[ShardSet],
    given: Mapping[str, Committed[TrainedModel] | None],
    tune: Committed[Tuned],
) -> TrainedModel:
    """The stage with the settings of the sweep's winner. Its training is not done twice: a winner
    that had the whole budget is taken as it is."""
    adopted = adopt(ctx, tune)
    if adopted is not None:
        return adopted
    recipe = configs.load_recipe(str(ctx.fetch(tune, RECIPE)))
    winning = StageConfig.of(recipe, tune.value.stage, config.watch)
    return training.run_stage(ctx, winning, shard, source_of(winning.training, given))


def source_of(
    stage: Any, given: Mapping[str, Committed[TrainedModel] | None]
) -> Committed[TrainedModel] | None:
    """The model that a stage begins with or asks, of those at hand: "teacher", "distilled"."""
    if stage.init == "distilled":
        return given.get("distilled")
    return given.get("teacher") if stage.uses_teacher else None


def adopt(ctx: StepContext, tune: Committed[Tuned]) -> TrainedModel | None:
    """The winner's own files: the same training with the same seed would make them again.

    None when there are none to take: the sweep's budget was not the whole one, or they are gone.
    """
    if tune.value.trained is None:
        return None
    home = home_of(ctx.workspace, tune.value.trained)
    try:
        record = read_record(home)
    except FileNotFoundError:
        return None
    trial: Committed[TrainedModel] = Committed(
        step="trial",
        fingerprint=record["fingerprint"],
        url=storage.join(home, "attempts", record["attempt"]),
        seconds=record["seconds"],
        value=from_json(TrainedModel, record["value"]),
    )
    first = tune.value.ema
    others = tuple(name for name in (trial.value.ema, *trial.value.emas) if name != first)
    order = (first, *others)

    def place(snapshot: str) -> tuple[int, int]:  # as training in that order would name them
        name, _, steps = snapshot.rpartition("-")
        return int(steps), order.index(name)

    snapshots = tuple(sorted(trial.value.snapshots, key=place))
    model = replace(trial.value, ema=first, emas=others, snapshots=snapshots)
    for name in files_of(model):
        data = ctx.fetch(trial, _trials_own(trial.value, model, name)).read_bytes()
        (ctx.out / name).parent.mkdir(exist_ok=True)
        (ctx.out / name).write_bytes(data)
    return replace(model, weights_sha256=storage.sha256(str(ctx.out / "weights.safetensors")))


def _trials_own(trial: TrainedModel, model: TrainedModel, name: str) -> str:
    """The trial's file that becomes `name`: its EMAs change places."""
    emas = {f"ema/{ema}.safetensors": ema for ema in model.emas} | {
        "weights.safetensors": model.ema
    }
    if name not in emas:
        return name
    return weights_file(trial, emas[name])


def weights_file(model: TrainedModel, ema: str) -> str:
    """Where a trained model keeps one of its sampling EMAs."""
    return "weights.safetensors" if ema == model.ema else f"ema/{ema}.safetensors"
