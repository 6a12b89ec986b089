"""adopt: what stands in a training stage's place where the recipe names a model from outside.

The step keeps the stage's name, so that all that comes after it finds its input as ever.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infra import storage
from infra.errors import UserError
from pipelines.adopted import CONFIG, WEIGHTS, Adopted, check_fit
from pipelines.artifacts import Committed, ShardSet, TrainedModel
from pipelines.dag import StepContext

if TYPE_CHECKING:
    from consistency.published import ModelDescription

LISTED = 5  # keys that a message names


@dataclass(frozen=True, kw_only=True)
class AdoptStage:
    """Identity of the step: what the model is, wherever it lies."""

    sha256: str  # of the file that holds the weights
    description: str  # ModelDescription as JSON
    model: Adopted = field(metadata={"identity": False})
    kind: Literal["adopted"] = "adopted"  # not trained: what a plan says when it changes

    @classmethod
    def of(cls, model: Adopted) -> "AdoptStage":
        return cls(sha256=model.sha256, description=model.description, model=model)


def run(ctx: StepContext, config: AdoptStage, shard: Committed[ShardSet]) -> TrainedModel:
    """A copy of the model, as if it had been trained here. UserError where it does not fit the
    data, or is not what its record or the plan said."""
    from consistency.published import ModelDescription

    model, key = config.model, f"{ctx.step}.from"
    data = shard.value
    check_fit(key, model, data.size, data.channels, data.class_names)
    try:
        about = ModelDescription.from_json(config.description)
    except ValueError as error:
        raise UserError(f"{key}: {model.place}: {error}") from error
    _copy_weights(key, model, ctx.out / WEIGHTS)
    parameters = _checked(key, model, about, ctx.out / WEIGHTS)
    (ctx.out / CONFIG).write_text(about.to_json())
    return TrainedModel(
        kind=about.kind,
        images=0,
        steps=0,
        parameters=parameters,
        final_loss=float("nan"),
        train_seconds=0.0,
        weights_sha256=storage.sha256(str(ctx.out / WEIGHTS)),
        ema="adopted",
        source=model.source,
    )


def _copy_weights(key: str, model: Adopted, target: Path) -> None:
    url = model.place if model.foreign else storage.join(model.place, WEIGHTS)
    if model.foreign:
        from safetensors.torch import save

        from pipelines import importing

        found = importing.read(model.place)
        target.write_bytes(save({k: v.contiguous() for k, v in found.weights.items()}))
        digest = storage.sha256(url)
    else:
        storage.download_file(url, str(target))
        digest = storage.sha256(str(target))
    if digest != model.sha256:
        raise UserError(
            f"{key}: {url} has the sha256 {digest[:12]}..., not {model.sha256[:12]}... as planned: "
            f"it is damaged, or has just been changed; run again, or import it anew"
        )


def _checked(key: str, model: Adopted, about: "ModelDescription", weights: Path) -> int:
    """Parameters of the network, of which the file must hold every one and nothing else.

    Only its header is read, and the network takes no memory.
    """
    from safetensors import SafetensorError, safe_open

    from consistency.published import build_network

    try:
        net = build_network(about, device="meta")
        with safe_open(weights, "pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{key}: {model.place} is not a whole model: {said}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    wrong = [
        *(f"{name} is missing" for name in wanted if name not in there),
        *(f"{name} is unknown" for name in there if name not in wanted),
        *(
            f"{name} is {list(there[name])}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in there and there[name] != shape
        ),
    ]
    if wrong:
        more = f", and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise UserError(
            f"{key}: the weights of {model.place} are not of the network it describes: "
            f"{', '.join(wrong[:LISTED])}{more}"
        )
    return sum(parameter.numel() for parameter in net.parameters())
