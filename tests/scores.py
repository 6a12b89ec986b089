"""Scores and references for tests that need some, not any in particular."""

from typing import Any

from consistency.evaluation.protocol import FeatureProtocol, Protocol
from pipelines.artifacts import Evaluation, ReferenceStats, Score

DOMAIN = FeatureProtocol(
    extractor="domain",
    weights_sha256="d0" * 32,
    layer="hidden",
    dim=64,
    resize="none",
    size=8,
    channels="native",
)
INCEPTION = FeatureProtocol(
    extractor="inception_fid",
    weights_sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    layer="pool3",
    dim=2048,
    resize="tf1",
    size=299,
)


def protocol(*, features: FeatureProtocol = DOMAIN, steps: int = 1, **changes: Any) -> Protocol:
    asked = {"samples": 100, "seed": 0, "seed_blocks": 1, **changes}
    return Protocol(features=features, reference="aa" * 32, n_reference=1797, steps=steps, **asked)


def score(
    candidate: str,
    steps: int,
    *values: float,
    features: FeatureProtocol = DOMAIN,
    samples: int = 100,
    **changes: Any,
) -> Score:
    heun = candidate == "teacher"
    fields: dict[str, Any] = {
        "candidate": candidate,
        "protocol": protocol(
            features=features, steps=steps, samples=samples, seed_blocks=len(values)
        ),
        "values": values,
        "sampler": "heun" if heun else "multistep",
        "evaluations": 2 * steps - 1 if heun else steps,
        "levels": () if heun else (80.0, 0.821)[:steps],
        "ema": "power-0.1",
        "weights_sha256": "ee" * 32,
        "images_sha256": "ff" * 32,
        "code": "0",
        "agreement": None,
        "secondary": {},
        "grid": f"{candidate}-{steps}.png",
    }
    return Score(**(fields | changes))


def reference(features: FeatureProtocol = DOMAIN, **changes: Any) -> ReferenceStats:
    fields: dict[str, Any] = {
        "protocol": features,
        "extractor_file": "features.safetensors",
        "digest": "aa" * 32,
        "count": 1797,
        "total_variance": 9.873,
        "halves": 0.31,
        "accuracy": 0.9911,
    }
    return ReferenceStats(**(fields | changes))


def evaluation(*scores: Score, mid_sigma: float = 0.821, floor: float | None = 0.31) -> Evaluation:
    features = scores[0].protocol.features
    return Evaluation(features=features, mid_sigma=mid_sigma, floor=floor, scores=scores)
