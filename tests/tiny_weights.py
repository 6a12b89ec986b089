"""Tiny files in place of the weights of feature networks, for the tests that look for them."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from consistency.evaluation.specs import SPECS
from infra.errors import UserError

FID_DATA = b"the standard network " * 200_000  # some blocks of a download
FID = dataclasses.replace(
    SPECS["inception_fid"],
    sha256=hashlib.sha256(FID_DATA).hexdigest(),
    bytes=len(FID_DATA),
    url="http://127.0.0.1:9/weights.pth",  # nobody listens at the discard port
)
OTHER = SPECS["squeezenet11"]
OTHER_DATA = b"any network"
OTHER_SHA = hashlib.sha256(OTHER_DATA).hexdigest()


def stand_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, an empty home, no proxy, and a small file for the standard weights."""
    for name in ("CMFORGE_WEIGHTS", "CMFORGE_INCEPTION_WEIGHTS", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(SPECS, "inception_fid", FID)
    monkeypatch.chdir(tmp_path)


def put(file: Path, data: bytes = FID_DATA) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def refused(function, *arguments) -> str:
    """The one line a person reads."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text
