"""Models from outside that a recipe names instead of training them (`teacher.from`, ...): what they
mean for the rest of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import yaml

from consistency.config import NetworkConfig, NoiseConfig
from infra.errors import UserError
from pipelines.adopted import Adopted, check_fit, look
from pipelines.recipe import Recipe

KINDS = {
    "teacher": ("denoiser",),
    "distill": ("consistency",),
    "isolate": ("consistency", "mean_flow"),
}


def find(recipe: Recipe) -> dict[str, Adopted]:
    """By stage, the models that a recipe adopts. Raises UserError for what is none."""
    found: dict[str, Adopted] = {}
    for stage in KINDS:
        place = getattr(recipe, stage).from_
        if place is not None:
            found[stage] = look(f"{stage}.from", place, KINDS[stage])
    return found


def resolved(recipe: Recipe, models: Mapping[str, Adopted]) -> Recipe:
    """The recipe with the network and the noise axis of the teacher that it adopts.

    Raises UserError where what else it says does not go with the models.
    """
    for stage, model in models.items():
        if recipe.data.size is not None and recipe.data.size != model.about.size:
            check_fit(f"{stage}.from", model, recipe.data.size, model.about.channels, None)
        noise, middle = model.about.noise, recipe.evaluate.mid_sigma
        if not noise.sigma_min < middle < noise.sigma_max:
            raise UserError(
                f"evaluate.mid_sigma: {middle} must lie between {noise.sigma_min:g} and "
                f"{noise.sigma_max:g}, the noise of {stage}.from, {model.place}"
            )
    if (teacher := models.get("teacher")) is not None:
        recipe = _on(recipe, "teacher", teacher)
        for key in recipe.hiding_classes() if not teacher.about.network.class_conditional else ():
            raise UserError(
                f"{key}: hides classes, but the model of teacher.from, {teacher.place}, knows none"
            )
    if recipe.truncate is not None and recipe.truncate.of in models:
        _check_first_stage(recipe, models[recipe.truncate.of])
    return recipe


def basis(recipe: Recipe, models: Mapping[str, Adopted], stage: str) -> Recipe:
    """A resolved recipe with network and noise axis of the model that a stage begins with or asks.

    They are the recipe's own, unless that model is an adopted student.
    """
    of = stage
    if stage == "truncate" and recipe.truncate is not None:
        of = recipe.truncate.of
    if of == "isolate" and of not in models and recipe.isolate.init == "distilled":
        of = "distill"
    if of == "teacher" or of not in models:
        return recipe
    return _on(recipe, of, models[of])


def overrides(recipe: Recipe) -> tuple[str, ...]:
    """A resolved recipe's network and noise axis, for texts that recipes are made from."""

    def flow(value: NetworkConfig | NoiseConfig) -> str:
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}
        text: str = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000)
        return text.strip()

    return (f"network={flow(recipe.network)}", f"noise={flow(recipe.noise)}")


def refuse_contradictions(recipe: Recipe, typed: Sequence[str]) -> None:
    """UserError for an override of what an adopted teacher brings along, unless it says the same.

    What a recipe file says there is its own network's, and gives way in silence.
    """
    keys = [text.partition("=")[0].strip() for text in typed]
    keys = [key for key in keys if key.partition(".")[0] in ("network", "noise")]
    if recipe.teacher.from_ is None or not keys:
        return
    teacher = look("teacher.from", recipe.teacher.from_, KINDS["teacher"])
    theirs = _on(recipe, "teacher", teacher)
    for key in keys:
        mine, its = _value(recipe, key), _value(theirs, key)
        if mine != its:
            raise UserError(
                f"override {key}: is {its} of the model that teacher.from names; leave it out"
            )


def _on(recipe: Recipe, stage: str, model: Adopted) -> Recipe:
    """The recipe on a model's network and noise axis. UserError where the rest forbids it."""
    try:
        return replace(recipe, network=model.about.network, noise=model.about.noise)
    except ValueError as error:
        raise UserError(f"{error} (the noise of {stage}.from, {model.place})") from error


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part.strip())
    return value


def _check_first_stage(recipe: Recipe, first: Adopted) -> None:
    """The second stage of TCM asks the first one, so both are the identity at one sigma."""
    truncate, about = recipe.truncate, first.about
    assert truncate is not None
    if about.kind != "consistency":
        raise UserError(
            f"truncate.of: {first.place} ({truncate.of}.from) is a {about.kind} model, which has "
            f"no f to truncate; name another"
        )
    own = about.noise.sigma_min if truncate.boundary is None else truncate.boundary
    if own != about.boundary:
        raise UserError(
            f"truncate.boundary: {own:g} must be that of {first.place} ({truncate.of}.from), "
            f"{about.boundary:g}"
        )
    if not about.noise.sigma_min < truncate.sigma_prime < about.noise.sigma_max:
        raise UserError(
            f"truncate.sigma_prime: {truncate.sigma_prime:g} must lie between sigma_min and "
            f"sigma_max of {first.place} ({truncate.of}.from), {about.noise.sigma_min:g} and "
            f"{about.noise.sigma_max:g}"
        )
