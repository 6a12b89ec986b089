"""What steps hand to each other: small typed values, JSON-able, with paths relative to their home.

A committed step is a directory (`Committed.url`) plus one of these values. Values never hold
absolute paths, so committed steps outlive a move of the workspace. (A registry in sqlite does not:
MLflow itself records absolute paths, see `infra.tracking`.)
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

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
    """`features.safetensors` (the feature net) and `stats.safetensors` (n, mean, m2)."""

    metric: str  # its own name, never "fid"
    count: int
    accuracy: float | None  # of the feature net; None when there are no two classes to tell apart
    total_variance: float  # trace of the covariance, the unit of "percent"
    halves_percent: float  # distance between two halves of the real images: the floor


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


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the metric table; the grid is a PNG in the same directory."""

    candidate: str  # "teacher" | "distill" | "isolate" | "truncate"
    sampler: str  # "heun" | "multistep" | "mean_flow"
    steps: int
    evaluations: int  # network calls per image (NFE)
    samples: int
    distance: float
    percent: float  # 100 * distance / trace of the reference covariance
    agreement: float | None  # share of samples the feature net puts in the asked-for class
    grid: str
    levels: tuple[float, ...]  # sigmas of multistep, times of mean_flow


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every score under one protocol."""

    metric: str
    mid_sigma: float  # second level asked of two-step samples
    floor_percent: float
    scores: tuple[Score, ...]

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
    percent: float
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
    if get_origin(hint) is tuple:
        return tuple(_decode(get_args(hint)[0], item) for item in raw)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, raw)
    return raw
