"""What makes two numbers comparable, and who may be called FID."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from consistency.evaluation.protocol import FID_SHA256, FeatureProtocol, Protocol
from consistency.evaluation.specs import SPECS
from pipelines.artifacts import _decode, to_json
from tests.scores import DOMAIN, INCEPTION, protocol

ROOT = Path(__file__).parents[1]
OTHER: dict[str, Any] = {
    "extractor": "x",
    "weights_sha256": "0" * 64,
    "layer": "logits",
    "dim": 7,
    "resize": "bilinear",
    "size": 224,
    "channels": "native",
    "quantise": "none",
    "precision": "bfloat16",
    "reference": "bb" * 32,
    "n_reference": None,
    "samples": 7,
    "seed": 7,
    "seed_blocks": 7,
    "steps": 7,
    "ddof": 0,
    "root": "sqrtm",
    "engine": 99,
}


def changed(base: Protocol, field: str) -> Protocol:
    """With another value of one field, of its own or of its features."""
    if field in {f.name for f in dataclasses.fields(FeatureProtocol)} - {"precision"}:
        features = dataclasses.replace(base.features, **{field: OTHER[field]})
        return dataclasses.replace(base, features=features)
    return dataclasses.replace(base, **{field: OTHER[field]})


FIELDS = sorted(
    {f.name for f in (*dataclasses.fields(FeatureProtocol), *dataclasses.fields(Protocol))}
    - {"features"}
)


def test_every_field_has_another_value_here() -> None:
    assert set(FIELDS) == set(OTHER)


@pytest.mark.parametrize("field", FIELDS)
def test_any_field_changes_the_digest_and_the_record(field: str) -> None:
    base = protocol(features=INCEPTION, samples=50_000)
    other = changed(base, field)
    assert other.digest != base.digest
    different = [k for k, v in other.flat().items() if base.flat()[k] != v]
    assert different == ["generator_precision" if field == "precision" else field]


def test_the_record_has_every_field_once() -> None:
    assert set(protocol().flat()) == {*FIELDS, "generator_precision"}
    of_features = dataclasses.replace(DOMAIN, precision="float16")
    assert protocol(features=of_features).digest != protocol().digest


def test_equal_protocols_have_equal_digests_whoever_made_them() -> None:
    base = protocol(features=INCEPTION)
    assert _decode(Protocol, to_json(base)) == base
    assert re.fullmatch("[0-9a-f]{16}", base.digest)


@pytest.mark.parametrize("field", ["weights_sha256", "layer", "resize", "size"])
def test_fid_is_the_standard_network_layer_and_resize_alone(field: str) -> None:
    assert INCEPTION.metric == "fid"
    assert dataclasses.replace(INCEPTION, **{field: OTHER[field]}).metric == "fd_inception_fid"


def test_a_name_makes_no_fid() -> None:
    for name in ("fid", "inception_fid", "fid50k"):
        assert dataclasses.replace(DOMAIN, extractor=name).metric == f"fd_{name}"
    assert SPECS["inception_fid"].sha256 == FID_SHA256


def test_names_carry_their_n() -> None:
    def name(features: FeatureProtocol, samples: int) -> str:
        return protocol(features=features, samples=samples).name

    assert name(INCEPTION, 50_000) == "fid50k"
    assert name(INCEPTION, 5_000) == "fid_5k"
    assert name(DOMAIN, 50_000) == "fd_domain_50k"
    assert name(DOMAIN, 2_345) == "fd_domain_2345"


def test_only_the_domain_nets_numbers_are_percentages() -> None:
    assert DOMAIN.unit == "%"
    assert INCEPTION.unit == ""


def test_few_samples_are_told_from_too_few() -> None:
    assert "singular" in (protocol(samples=64).bias or "")
    assert "biased" in (protocol(samples=65).bias or "")
    assert "640" in (protocol(samples=639).bias or "")
    assert protocol(samples=640).bias is None


def test_the_word_is_produced_in_one_place() -> None:
    """No other code may write a metric's name that begins with fid."""
    word = re.compile(r"""["']fid(?![a-z])""")
    found = {
        str(path.relative_to(ROOT))
        for folder in ("consistency", "pipelines", "infra")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if word.search(line.split("#")[0])
        and '"""' not in line
        # Asking whether a name is that one produces none.
        and not re.search(r"""(==|!=|startswith\()\s*["']fid""", line)
    }
    # The registry's tag says by what kind of number was decided, not how it is called.
    assert found == {"consistency/evaluation/protocol.py", "infra/registry.py"}
