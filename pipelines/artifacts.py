"""What steps hand to each other: small typed values, JSON-able, with paths relative to their home.

A committed step is a directory (`Committed.url`) plus one of these values. Values never hold
absolute paths, so committed steps outlive a move of the workspace. (A registry in sqlite does not:
MLflow itself records absolute paths, see `infra.tracking`.)
"""

import dataclasses
import hashlib
import json
import math
import statistics
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from consistency.evaluation.protocol import FeatureProtocol, Protocol

MEASURED = {"measured": True}  # depends on the clock, so no part of what a result is


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """WebDataset shards in `shards/` beside their manifest."""

    count: int
    size: int
    channels: int
    class_names: tuple[str, ...]
    num_shards: int
    bytes: int
    pixel_digest: str
    manifest_sha256: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, kw_only=True)
class ReferenceStats:
    """The feature network's file and `stats.safetensors` (mean, covariance, n) of the real images.

    `real_features.npy` holds float32 features of the first real images, for metrics of sets.
    """

    protocol: FeatureProtocol
    extractor_file: str
    digest: str  # of what the statistics come from: the pixels, or the file of another project
    count: int | None  # None: of others, who do not say
    total_variance: float  # trace of the covariance, the unit of "%"
    halves: float | None  # reported distance between two halves of the real images: the floor
    accuracy: float | None  # of the domain net; None when there are no two classes to tell apart

    def reported(self, distance: float) -> float:
        """A Frechet distance in the metric's unit."""
        return 100 * distance / self.total_variance if self.protocol.unit == "%" else distance


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """`weights.safetensors` (fp32, of one sampling EMA) and `config.json`; the loss over time is in
    `curve.jsonl`, the other EMAs in `ema/NAME.safetensors`, and the snapshots of power EMAs in
    `snapshots/NAME-STEPS.safetensors`."""

    kind: str  # "denoiser" | "consistency" | "mean_flow"
    images: int
    steps: int
    parameters: int
    final_loss: float = field(metadata=MEASURED)
    train_seconds: float = field(metadata=MEASURED)
    weights_sha256: str
    ema: str  # which one the weights are
    emas: tuple[str, ...] = ()  # the names of the others
    snapshots: tuple[str, ...] = ()  # NAME-STEPS
    watched: bool = field(default=False, metadata=MEASURED)  # `watch.jsonl` has its distances
    best: str | None = field(default=None, metadata=MEASURED)  # of them, whose weights are `best/`
    # Where an adopted model is from, for people; it has no curve. None: trained here.
    source: str | None = field(default=None, metadata=MEASURED)


@dataclass(frozen=True, kw_only=True)
class SearchedModel(TrainedModel):
    """A model whose `config.json` has the noise levels that were searched; `sigmas.json` holds
    every list that was measured."""

    searched: tuple[tuple[float, ...], ...]  # sigmas, one list per number of steps that has one


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a sweep decided: `recipe.yaml` is the recipe with the winner's settings, `delta.yaml`
    what differs. `summary.json` holds every trial, `sweep.html` shows them."""

    sweep: str
    stage: str
    trials: int
    winner: int
    settings: tuple[str, ...]  # overrides that make the winner of the recipe
    ema: str  # the winner's best sampling EMA
    # Fingerprint of the trial whose files are the stage's result; None: it is trained anew, since
    # trials had a smaller budget.
    trained: str | None
    metric: str  # with its n
    value: float
    spent: float = field(metadata=MEASURED)  # share of what all trials in full would have cost


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the metric table; the grid is a PNG in the same directory.

    A table's figure is `value`, the mean over seed blocks; papers that follow EDM print `lowest`.
    """

    candidate: str  # "teacher" | "distill" | "isolate" | "truncate"
    protocol: Protocol  # rows of different protocols do not compare
    values: tuple[float, ...]  # one per seed block, in the metric's unit
    sampler: str  # "heun" | "multistep" | "mean_flow"
    evaluations: int  # network calls per image (NFE)
    levels: tuple[float, ...]  # sigmas of multistep, times of mean_flow
    ema: str  # which sampling EMA the weights are
    weights_sha256: str
    images_sha256: str  # of every sample, in order: the same samples again, or not
    code: str  # cmforge's version
    agreement: float | None  # share of samples the domain net puts in the asked-for class
    secondary: dict[str, float]  # metrics of sets, of the first seed block
    grid: str

    @property
    def steps(self) -> int:
        return self.protocol.steps

    @property
    def samples(self) -> int:
        return self.protocol.samples

    @property
    def value(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values)

    @property
    def std(self) -> float | None:
        """Of one block's number; None for a single block."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every score under one feature network and reference."""

    features: FeatureProtocol
    mid_sigma: float  # second level asked of two-step samples
    floor: float | None  # two halves of the real images, in the metric's unit
    scores: tuple[Score, ...]

    @property
    def metric(self) -> str:
        """ "fid" of the verified network, else "fd_<extractor>"."""
        return self.features.metric

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.2f} %" if self.features.unit else f"{value:.4g}"

    def score(self, candidate: str, steps: int) -> Score:
        return next(s for s in self.scores if s.candidate == candidate and s.steps == steps)


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """Exactly one MLflow model version per artifact digest."""

    name: str
    version: int
    alias: str | None  # the alias it holds after this step; None when the gate kept it back
    candidate: str
    digest: str
    metric: str  # with its n: fid50k, fd_domain_2k
    value: float
    outcome: str  # champion | challenger | refused | no decision
    decision: str  # why the alias moved, or did not


@dataclass(frozen=True, kw_only=True)
class Report:
    """One self-contained HTML page."""

    file: str
    bytes: int


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Committed(Generic[T]):
    """A finished step: where its files are, and its value."""

    step: str
    fingerprint: str
    url: str  # directory of the committed attempt's files
    seconds: float
    value: T


def to_json(value: Any) -> dict[str, Any]:
    """A value of this module as plain JSON types."""
    return dataclasses.asdict(value)


def content_of(value: Any) -> str:
    """Digest of what a value says, measured fields apart: equal means "the same result again"."""
    said = to_json(value)
    for item in dataclasses.fields(value):
        if item.metadata.get("measured"):
            del said[item.name]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def from_json(cls: type, raw: Any) -> Any:
    """Rebuild what `to_json` made. Raises TypeError or KeyError when it is of another shape."""
    hints = get_type_hints(cls)
    return cls(**{name: _decode(hints[name], item) for name, item in raw.items()})


def _decode(hint: Any, raw: Any) -> Any:
    if get_origin(hint) is UnionType:  # X | None
        if raw is None:
            return None
        (hint,) = (member for member in get_args(hint) if member is not NoneType)
    if get_origin(hint) is tuple:
        return tuple(_decode(get_args(hint)[0], item) for item in raw)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, raw)
    return raw
