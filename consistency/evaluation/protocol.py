"""What a number means: everything two numbers must have in common before they may be compared.

The word "fid" is produced here and nowhere else, and only from the hash of the weights.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

# The 2015 Inception network as converted for torch by the FID implementations.
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FID_BYTES = 95_628_359
ENGINE = 1  # raise it when a change of code changes what a number means
DOMAIN = "domain"  # the classifier trained on the data at hand: no fixed unit
DOMAIN_FEATURES = 64


@dataclass(frozen=True, kw_only=True)
class FeatureProtocol:
    """How an image becomes features."""

    extractor: str
    weights_sha256: str
    layer: str
    dim: int  # D, numbers per image
    resize: str  # "tf1", "bilinear", "bicubic", "none"; "own" when the extractor's file does it
    size: int  # side the network sees, in pixels
    channels: str = "rgb"  # grey repeated; "native" where the network knows the data's channels
    quantise: str = "round_half_up_u8"  # samples to 8 bits, all 256 levels kept
    precision: str = "float32"

    @property
    def metric(self) -> str:
        """ "fid" for the standard network, layer and resize alone; else "fd_<extractor>"."""
        standard = (self.weights_sha256, self.layer, self.resize, self.size) == (
            FID_SHA256,
            "pool3",
            "tf1",
            299,
        )
        return "fid" if standard else f"fd_{self.extractor}"

    @property
    def unit(self) -> str:
        """ "%" of the reference's total variance for the domain net, whose scale is arbitrary."""
        return "%" if self.extractor == DOMAIN else ""

    @property
    def digest(self) -> str:
        return digest_of(self)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model's number came about. What the model is (its EMA, its sigmas) is not part of it:
    that is what is compared."""

    features: FeatureProtocol
    reference: str  # digest of what the reference statistics were computed from
    n_reference: int | None  # None: statistics of others that do not say
    samples: int  # per seed block
    seed: int
    seed_blocks: int  # block b has the samples [b * samples, (b + 1) * samples)
    steps: int  # of the sampler
    precision: str = "float32"  # of the generator
    ddof: int = 1  # covariances are divided by n - ddof
    root: str = "nuclear_v1"
    engine: int = ENGINE

    @property
    def name(self) -> str:
        """The metric with its n: fid50k, fid_5k, fd_domain_2k. Distances fall with n."""
        metric = self.features.metric
        if metric == "fid" and self.samples == 50_000:
            return "fid50k"
        thousands, rest = divmod(self.samples, 1_000)
        return f"{metric}_{self.samples}" if rest else f"{metric}_{thousands}k"

    @property
    def digest(self) -> str:
        return digest_of(self)

    @property
    def bias(self) -> str | None:
        """What n does to the distance; None from 10 D samples on (the bias falls as 1/n)."""
        n, dim = self.samples, self.features.dim
        if n <= dim:
            return f"{n} samples of {dim} features: a singular covariance, mostly bias"
        if n < 10 * dim:
            return f"{n} samples of {dim} features: below {10 * dim} clearly biased upwards"
        return None

    def flat(self) -> dict[str, str | int | None]:
        """Every field on one level, as a record that can be compared key by key."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("features"), "generator_precision": fields.pop("precision"), **fields}


def digest_of(protocol: FeatureProtocol | Protocol) -> str:
    """16 hex digits over every field."""
    text = json.dumps(dataclasses.asdict(protocol), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
