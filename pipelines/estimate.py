"""What a recipe will cost, before anything starts: images, FLOPs, GPU-hours by device, memory.

No data is read. FLOPs and bytes are counted on the recipe's own networks (`consistency.flops`);
how fast a device really is stays an assumption, the share of its peak (MFU), which is printed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from consistency.config import PowerEMA, TeacherConfig, TrainConfig, check_network
from consistency.method_config import (
    ConsistencyConfig,
    MeanFlowConfig,
    SCMConfig,
    StageTraining,
    TargetEMA,
    TruncateConfig,
)
from consistency.sigma_search import FINALISTS
from infra.errors import UserError
from pipelines import adopting, config
from pipelines.adopted import Adopted
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from consistency.flops import PassCost

GIB = 2**30
USABLE = 0.9  # of a device's memory: the rest is for the framework, buffers and fragmentation

STUDENT = 3  # forward and backward, in forward passes
# A forward-mode derivative beside the value: every product once plain, once with the tangent of its
# input (tests count it).
JVP = 2


@dataclass(frozen=True)
class Device:
    """Dense peaks of the data sheets in FLOP/s (those "with sparsity" are twice as much)."""

    name: str
    half: float  # fp16 tensor cores with fp32 accumulation; bf16 is as fast where there is any
    single: float  # TF32 tensor cores, or plain fp32 where there are none
    gib: int
    has_bf16: bool = True

    def hours(self, work: "Sequence[Work]", mfu: float) -> float:
        """Infinite for a precision that the device does not have."""
        peak = {"fp32": self.single, "fp16": self.half, "bf16": self.half * self.has_bf16}
        if not all(peak[part.precision] for part in work):
            return math.inf
        return sum(part.flops / (peak[part.precision] * mfu) for part in work) / 3600


DEVICES = (
    # NVIDIA H200 Tensor Core GPU data sheet, SXM: 1,979 TFLOPS bf16 and 989 TF32 with sparsity.
    Device("H200", 989.5e12, 494.7e12, 141),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM: the same.
    Device("H100", 989.5e12, 494.7e12, 80),
    # NVIDIA A100 80GB data sheet, SXM: 312 TFLOPS bf16, 156 TF32, without sparsity.
    Device("A100", 312e12, 156e12, 80),
    # NVIDIA V100 data sheet, SXM2: 125 TFLOPS fp16, 15.7 fp32; no bf16.
    Device("V100", 125e12, 15.7e12, 32, has_bf16=False),
    # NVIDIA Ada GPU architecture whitepaper, appendix A: 165.2 TFLOPS fp16 with fp32 accumulation,
    # 82.6 TF32, without sparsity.
    Device("RTX 4090", 165.2e12, 82.6e12, 24),
)


@dataclass(frozen=True)
class Work:
    flops: float
    precision: str


@dataclass(frozen=True)
class Stage:
    """One training stage. `parts`: what a step does to each image, in forward passes of its network
    (or of LPIPS), with the FLOPs and the precision."""

    name: str
    images: int
    steps: int
    batch: int
    parts: tuple[tuple[str, float, Work], ...]
    resident: int  # bytes whatever the batch
    saved: int  # bytes per image of the micro-batch

    @property
    def work(self) -> list[Work]:
        return [Work(w.flops * self.images, w.precision) for _, _, w in self.parts]

    def bytes_at(self, micro_batch: int) -> int:
        return self.resident + self.saved * micro_batch

    def largest_micro_batch(self, device: Device) -> int:
        """Images that fit; 0: not even one."""
        return max(0, int((USABLE * device.gib * GIB - self.resident) // self.saved))


@dataclass(frozen=True)
class Estimate:
    name: str
    size: int
    channels: int
    classes: int
    parameters: int
    forward: int  # FLOPs per image
    stages: tuple[Stage, ...]
    sampling: Work
    evaluations: int  # network calls for one image each
    assumed: tuple[str, ...]

    @property
    def work(self) -> list[Work]:
        return [*(work for stage in self.stages for work in stage.work), self.sampling]


def load_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """As `config.load_recipe`, but the recipe need not know where its data is."""
    try:
        return config.load_recipe(name, overrides)
    except UserError as error:
        if "data.path: source" not in str(error):
            raise
        return config.load_recipe(name, ["data.path=unread", *overrides])


# Side, channels and classes (an EMNIST in idx files has others).
KNOWN = {"digits": (8, 1, 10), "idx": (28, 1, 10), "cifar10": (32, 3, 10), "sheets": (32, 3, 10)}


def image_shape(
    recipe: Recipe,
    models: Mapping[str, Adopted],
    size: int | None,
    channels: int | None,
    classes: int | None,
) -> tuple[int, int, int, list[str]]:
    """Side, channels, classes (0: unconditional), and what of it was assumed."""
    data, conditional = recipe.data, recipe.network.class_conditional
    side, depth, kinds = KNOWN.get(data.source, (None, 3, 1000))
    for about in (model.about for model in models.values()):  # the data must be like them
        side, depth = about.size, about.channels
        kinds = len(about.class_names) if about.network.class_conditional else kinds
    side = size or data.size or side
    if side is None:
        raise UserError(
            f"data.size: only the data says how large images of source {data.source} are; "
            f"say it here with --size 64"
        )
    assumed = []
    if data.source not in KNOWN and not models:
        assumed += [f"{depth} channels (--channels)"] if channels is None else []
        assumed += [f"{kinds} classes (--classes)"] if classes is None and conditional else []
    return side, channels or depth, (classes or kinds) if conditional else 0, assumed


def estimate(
    recipe: Recipe,
    *,
    size: int | None = None,
    channels: int | None = None,
    classes: int | None = None,
) -> Estimate:
    """What is given of the images wins over what the recipe tells of them.

    Raises UserError when their size is unknown or does not fit the network.
    """
    for name, value in {"size": size, "channels": channels, "classes": classes}.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    models = adopting.find(recipe)
    recipe = adopting.resolved(recipe, models)
    side, depth, kinds, assumed = image_shape(recipe, models, size, channels, classes)
    try:
        check_network(recipe.network, side)
    except ValueError as error:
        raise UserError(f"network.{error}") from error
    images = _Images(side, depth, kinds)
    plain, evaluations = _network(recipe.teacher, recipe, images), _evaluations(recipe)
    training: dict[str, StageTraining] = {
        "teacher": recipe.teacher,
        "distill": recipe.distill,
        "isolate": recipe.isolate,
    }
    if recipe.truncate is not None:
        training["truncate"] = recipe.truncate
    return Estimate(
        name=recipe.name,
        size=side,
        channels=depth,
        classes=kinds,
        parameters=plain.parameters,
        forward=plain.forward,
        stages=tuple(
            _stage(name, stage, adopting.basis(recipe, models, name), images)
            for name, stage in training.items()
            if name not in models
        ),
        sampling=Work(plain.forward * evaluations, "fp32"),  # samplers use no autocast
        evaluations=evaluations,
        assumed=tuple(assumed),
    )


@dataclass(frozen=True)
class _Images:
    size: int
    channels: int
    classes: int


def _network(training: StageTraining, recipe: Recipe, images: _Images) -> "PassCost":
    from consistency.flops import network_cost
    from consistency.published import ModelDescription

    about = ModelDescription(
        kind="mean_flow" if isinstance(training, MeanFlowConfig) else "denoiser",
        network=recipe.network,
        noise=recipe.noise,
        size=images.size,
        channels=images.channels,
        class_names=("",) * images.classes,
    )
    return network_cost(
        about,
        dropout=0.5 if training.dropout else 0.0,  # how much of it makes no difference here
        dropout_max_side=training.dropout_max_side if training.dropout else None,
        half=training.precision != "fp32",
    )


def _stage(name: str, training: StageTraining, recipe: Recipe, images: _Images) -> Stage:
    network = _network(training, recipe, images)
    resident, saved = _resident(training, network), network.saved
    parts = []
    for what, units in _passes(training, images.classes > 0):
        precision = "fp32" if what == "JVP" else training.precision  # see objectives.jvp
        parts.append((what, units, Work(units * network.forward, precision)))
    if isinstance(training, ConsistencyConfig) and training.distance == "lpips":
        from consistency.flops import lpips_cost

        lpips = lpips_cost(images.size, images.channels)
        # Both images forwards, and backwards to the first one alone.
        parts.append(("LPIPS", 1.5, Work(1.5 * lpips.forward, "fp32")))
        resident, saved = resident + 4 * lpips.parameters, saved + lpips.saved
    return Stage(
        name=name,
        images=training.steps * training.batch,
        steps=training.steps,
        batch=training.batch,
        parts=tuple(parts),
        resident=resident,
        saved=saved,
    )


def _passes(training: StageTraining, has_classes: bool) -> list[tuple[str, float]]:
    """What a step does to each image, in forward passes."""
    student: list[tuple[str, float]] = [("student", STUDENT)]
    match training:
        case ConsistencyConfig(path=path, guidance=guidance):
            calls = {"heun": 2, "euler": 1, "noise": 0}[path] * (1 if guidance == 1 else 2)
            passes = [*student, ("target", 1), ("teacher", calls)]
        case SCMConfig(path=path, guidance=guidance):
            calls = (path == "teacher") * (1 if guidance == 1 else 2)
            passes = [*student, ("JVP", JVP), ("teacher", calls)]
        case MeanFlowConfig(guidance=guidance, kappa=kappa):
            guided = has_classes and (guidance != 1 or kappa != 0)
            passes = [*student, ("JVP", JVP), ("guidance", 2 * guided)]
        case TruncateConfig():
            passes = [*student, ("target", 1), ("first stage", 1)]
        case TeacherConfig():
            passes = student
    return [(what, units) for what, units in passes if units > 0]


def _resident(training: StageTraining, network: "PassCost") -> int:
    """Bytes of weights and optimiser, all in fp32, and of weights cast for the backward pass."""
    copies = 1 + 1 + 2  # the weights, their gradients, two moments of Adam or RAdam
    copies += len(training.ema)
    if isinstance(training, ConsistencyConfig) and isinstance(training.target, TargetEMA):
        copies += 1
    if not isinstance(training, TeacherConfig) and training.path != "noise":
        copies += 1  # the frozen teacher
    return 4 * copies * network.parameters + network.kept


def _evaluations(recipe: Recipe) -> int:
    """Network calls of the evaluation, and at most of select_ema and search_sigmas, each for one
    image."""
    asked = recipe.evaluate
    trained: dict[str, TrainConfig] = {"distill": recipe.distill, "isolate": recipe.isolate}
    trained |= {"truncate": recipe.truncate} if recipe.truncate else {}
    guided = 1 if asked.teacher_guidance == 1 else 2
    # One and two steps of every candidate; of the teacher too, where two Heun steps take 3 calls.
    samples = asked.samples * asked.seed_blocks
    calls = len(trained) * samples * (1 + 2) + guided * samples * (1 + 3)
    calls += guided * asked.teacher_samples * (2 * asked.teacher_steps - 1)
    if recipe.select_ema is not None:
        select = recipe.select_ema
        for training in (t for name, t in trained.items() if not recipe.adopts(name)):
            lengths = {ema.name for ema in training.ema}
            if training.snapshots:
                lengths |= {PowerEMA(sigma_rel=width).name for width in select.sigma_rel}
            calls += len(lengths) * select.samples * select.steps
    if recipe.search_sigmas is not None:
        searching = recipe.search_sigmas
        confirming = FINALISTS * searching.confirm_samples * searching.confirm_blocks
        samples = searching.evaluations * searching.samples + confirming
        calls += len(trained) * sum(n * samples for n in range(2, searching.steps + 1))
    return calls
