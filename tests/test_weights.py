"""Weights of feature networks: where they are looked for, and that they are what they should be.

Tiny files stand for the real ones; the first test is of the facts themselves.
"""

import dataclasses
import hashlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from consistency.evaluation.protocol import FID_BYTES, FID_SHA256
from consistency.evaluation.specs import SPECS
from pipelines import cli, doctor, weights
from pipelines.weights import Resolved, locate, resolve
from tests.tiny_weights import (
    FID,
    FID_DATA,
    OTHER,
    OTHER_DATA,
    OTHER_SHA,
    put,
    refused,
    stand_alone,
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    stand_alone(monkeypatch, tmp_path)


@pytest.fixture
def offline(monkeypatch):
    """Whoever opens a socket fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- the facts -----------------------------------------------------------------------------------


def test_only_the_pinned_standard_network_yields_fid(monkeypatch):
    monkeypatch.undo()
    assert (SPECS["inception_fid"].sha256, SPECS["inception_fid"].bytes) == (FID_SHA256, FID_BYTES)
    metrics = {name: weights.metric_of(spec) for name, spec in SPECS.items()}
    assert metrics.pop("inception_fid") == "fid"
    assert metrics == {name: f"fd_{name}" for name in metrics}
    unpinned = dataclasses.replace(SPECS["inception_fid"], sha256=None)
    assert weights.metric_of(unpinned) == "fd_inception_fid"


def test_each_network_is_filed_under_its_name():
    assert all(spec.name == name for name, spec in SPECS.items())
    assert len({spec.file for spec in SPECS.values()}) == len(SPECS)
    assert all(spec.url is None or spec.url.startswith("http") for spec in SPECS.values())


def test_looking_for_weights_imports_nothing_heavy_nor_any_client_of_the_network():
    code = (
        "import sys, pipelines.weights\n"
        "heavy = {'torch', 'numpy', 'ray', 'mlflow', 'urllib.request', 'http.client'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    root = str(Path(weights.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- finding -------------------------------------------------------------------------------------


def test_places_are_searched_in_order(monkeypatch, tmp_path, offline):
    """Every place holds the file; each time the winner is removed the next one wins."""
    monkeypatch.setenv("CMFORGE_WEIGHTS", str(tmp_path / "env"))
    monkeypatch.setenv("CMFORGE_INCEPTION_WEIGHTS", str(tmp_path / "mine.pth"))
    places = [
        put(tmp_path / "given" / FID.file),
        put(tmp_path / "env" / FID.file),
        put(tmp_path / "mine.pth"),
        put(tmp_path / "cache" / "cmforge" / "weights" / FID.file),
        put(tmp_path / "cache" / "torch" / "hub" / "checkpoints" / FID.file),
    ]
    for file in places:
        assert locate("inception_fid", str(tmp_path / "given")) == file
        assert resolve(["inception_fid"], str(tmp_path / "given")).path == file
        file.unlink()
        if file.name == "mine.pth":
            monkeypatch.delenv("CMFORGE_INCEPTION_WEIGHTS")
    assert locate("inception_fid", str(tmp_path / "given")) is None


def test_a_file_may_be_given_under_any_name(tmp_path, offline):
    file = put(tmp_path / "abc")
    assert resolve(["inception_fid"], "abc") == Resolved("inception_fid", file, FID.sha256)


@pytest.mark.parametrize("variable", ["TORCH_HOME", "XDG_CACHE_HOME", "HOME"])
def test_torch_hubs_folder_and_the_cache_follow_their_variables(monkeypatch, tmp_path, variable):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv(variable, str(tmp_path / "there"))
    below = {"TORCH_HOME": "", "XDG_CACHE_HOME": "torch", "HOME": ".cache/torch"}[variable]
    file = put(tmp_path / "there" / below / "hub" / "checkpoints" / FID.file)
    assert locate("inception_fid") == file
    cache = {
        "TORCH_HOME": tmp_path / "home" / ".cache",
        "XDG_CACHE_HOME": tmp_path / "there",
        "HOME": tmp_path / "there" / ".cache",
    }[variable]
    assert weights.cache_folder() == cache / "cmforge" / "weights"


def test_a_relative_cache_home_is_ignored_as_its_specification_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert weights.cache_folder() == tmp_path / "home" / ".cache" / "cmforge" / "weights"


def test_the_standard_file_is_found_under_the_name_others_give_it(tmp_path, offline):
    hub = tmp_path / "cache" / "torch" / "hub" / "checkpoints"
    file = put(hub / "pt_inception-2015-12-05-6726825d.pth")
    assert resolve(["inception_fid"], None).path == file


def test_the_variable_for_inception_is_for_inception_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("CMFORGE_INCEPTION_WEIGHTS", str(put(tmp_path / "mine.pth")))
    assert locate("squeezenet11") is None
    assert locate("inception_fid") == tmp_path / "mine.pth"


def test_the_first_of_the_list_whose_weights_are_there_is_taken(tmp_path, offline):
    folder = str(tmp_path / "given")
    other = put(tmp_path / "given" / OTHER.file, OTHER_DATA)
    wanted = ["inception_fid", "squeezenet11", "domain"]
    assert resolve(wanted, folder) == Resolved("squeezenet11", other, OTHER_SHA)
    file = put(tmp_path / "given" / FID.file)
    assert resolve(wanted, folder) == Resolved("inception_fid", file, FID.sha256)
    assert resolve(wanted[::-1], None) == Resolved("domain", None, None)
    assert resolve(["resnet56_cifar10", "domain"], folder) == Resolved("domain", None, None)


def test_an_entry_may_be_a_file_of_ones_own(tmp_path, offline):
    file = put(tmp_path / "nets" / "own.pt2", OTHER_DATA)
    found = Resolved("file", file, OTHER_SHA)
    assert resolve(["nets/own.pt2"], None) == resolve([str(file)], None) == found
    assert resolve(["nowhere/own.pt2", "nets/own.pt2"], None) == found
    assert f"{tmp_path}/nowhere/own.pt2 does not exist" in refused(
        resolve, ["nowhere/own.pt2"], None
    )


def test_a_changed_file_is_hashed_again(tmp_path):
    file = put(tmp_path / "own.pt2", OTHER_DATA)
    assert resolve(["own.pt2"], None).sha256 == OTHER_SHA
    put(file, b"another network, longer")
    assert resolve(["own.pt2"], None).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_missing_weights_say_what_where_and_how_to_get_them(tmp_path, offline):
    said = refused(resolve, ["inception_fid"], None)
    cache = tmp_path / "cache"
    for part in (
        "reference.extractor: weights of inception_fid not found: looked in ",
        f"{cache}/cmforge/weights, {cache}/torch/hub/checkpoints for {FID.file} or pt_inception-",
        f"({FID.bytes:,} bytes, sha256 {FID.sha256})",
        "cmforge weights fetch inception_fid, or cmforge weights import PATH, or reference.weights",
        "reference.extractor=[domain] (reports fd_domain, not comparable with ",
    ):
        assert part in said
    said = refused(resolve, ["squeezenet11", "inception_fid"], str(tmp_path))
    assert f"weights of squeezenet11 not found: looked in {tmp_path}, " in said
    assert "cmforge weights import PATH --as squeezenet11" in said
    assert "fetch squeezenet11" not in said  # there is no address to fetch it from
    assert "weights of inception_fid not found" in said


def test_the_way_out_is_a_network_at_hand(tmp_path, offline):
    put(weights.cache_folder() / OTHER.file, OTHER_DATA)
    said = refused(resolve, ["inception_fid"], None)
    assert "reference.extractor=[squeezenet11] (reports fd_squeezenet11, not comparable" in said


@pytest.mark.parametrize("data", [FID_DATA[:-1], b"", FID_DATA[:-1] + b"!", b"<html>"])
def test_a_wrong_file_is_refused_with_both_hashes_and_never_passed_over(tmp_path, data, offline):
    put(weights.cache_folder() / OTHER.file, OTHER_DATA)
    file = put(weights.cache_folder() / FID.file, data)
    said = refused(resolve, ["inception_fid", "squeezenet11", "domain"], None)
    assert said.startswith(
        f"{file}: not the weights of inception_fid: {len(data):,} bytes, sha256 "
    )
    assert hashlib.sha256(data).hexdigest() in said
    assert f"expected {FID.bytes:,} bytes, sha256 {FID.sha256}" in said
    # Nor is the place passed over for a later one.
    put(tmp_path / "cache" / "torch" / "hub" / "checkpoints" / FID.file)
    assert refused(resolve, ["inception_fid"], None) == said


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("inception", "inception_fid"),
        ("inception-fid", "inception_fid"),
        ("squeezenet", "squeezenet11"),
        ("domian", "domain"),
        ("zzz", None),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, near):
    said = refused(resolve, ["domain", name], None)  # even where it is not needed
    assert said.startswith(f"unknown feature network {name!r}")
    assert all(known in said for known in SPECS)
    assert (f"did you mean {near!r}?" in said) == (near is not None)


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("CMFORGE_WEIGHTS", "is not a folder; mend or unset it"),
        ("CMFORGE_INCEPTION_WEIGHTS", "is not a file; mend or unset it"),
    ],
)
def test_a_variable_that_leads_nowhere_is_said(monkeypatch, tmp_path, variable, said):
    put(weights.cache_folder() / FID.file)
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    assert refused(resolve, ["inception_fid"], None) == f"{variable}: {tmp_path}/nowhere {said}"
    assert f"{variable}: {tmp_path}/nowhere {said}" in weights.summary()
    monkeypatch.setenv(variable, "")
    assert resolve(["inception_fid"], None).name == "inception_fid"


def test_given_weights_that_cannot_be_meant_are_refused(tmp_path):
    put(weights.cache_folder() / FID.file)
    said = refused(resolve, ["inception_fid"], "nowhere")
    assert said == f"reference.weights: {tmp_path}/nowhere does not exist; mend the path"
    file = str(put(tmp_path / "file"))
    said = refused(resolve, ["inception_fid", "squeezenet11"], file)
    assert f"{file} is one file, but reference.extractor names inception_fid and squeezene" in said
    said = refused(resolve, ["domain"], file)
    assert f"{file} is of no network of reference.extractor [domain]" in said
    assert resolve(["inception_fid", "domain"], file).path == Path(file)


# --- commands ------------------------------------------------------------------------------------


def test_the_list_says_what_is_at_hand(capsys, tmp_path, offline):
    other = put(weights.cache_folder() / OTHER.file, OTHER_DATA)
    put(weights.cache_folder() / FID.file, b"damaged")
    assert cli.main(["weights", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["network", "metric", "licence", "file"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert list(rows) == list(SPECS)
    assert rows["squeezenet11"].split() == [
        *("squeezenet11", "fd_squeezenet11", OTHER.licence, str(other))
    ]
    assert rows["dinov2_vitl14"].endswith(" missing")
    assert "not the weights of inception_fid" in rows["inception_fid"]


def test_doctor_names_the_networks_and_never_fails_for_them(tmp_path, offline):
    def line() -> str:
        (check,) = [doctor._look("feature nets", weights.summary)]
        assert check.ok
        return check.detail

    missing = "FID: weights not found; cmforge weights fetch inception_fid"
    assert line() == f"at hand: domain; {missing}"
    put(weights.cache_folder() / OTHER.file, OTHER_DATA)
    assert line() == f"at hand: domain, squeezenet11; {missing}"
    file = put(weights.cache_folder() / FID.file, b"damaged")
    assert line().startswith(f"at hand: domain, squeezenet11; {file}: not the weights of incep")
    put(file)
    assert line() == "at hand: domain, inception_fid, squeezenet11"
