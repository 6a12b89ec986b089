"""Statistics files as other projects write them, and one clear line for each that is broken."""

import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest

from consistency.evaluation.frechet import Gaussian, GaussianStats, frechet_distance
from consistency.evaluation.npz import read_npz, write_npz
from consistency.evaluation.protocol import FeatureProtocol

PROTOCOL = FeatureProtocol(
    extractor="squeezenet11", weights_sha256="ab" * 32, layer="fire9", dim=6, resize="tf1", size=112
)
STATS = GaussianStats.from_features(np.random.default_rng(0).standard_normal((50, 6)) + 2)
MU, SIGMA = STATS.mean, STATS.covariance


def save(folder, **arrays):
    np.savez(folder / "stats.npz", **arrays)
    return folder / "stats.npz"


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize("n", [50, None])
@pytest.mark.parametrize("protocol", [PROTOCOL, None])
@pytest.mark.parametrize("name", ["reference.npz", "reference"])
def test_what_is_written_is_read_back(tmp_path, n, protocol, name):
    write_npz(tmp_path / name, Gaussian(MU, SIGMA, n), protocol)
    gaussian, found = read_npz(tmp_path / name)
    np.testing.assert_array_equal(gaussian.mean, MU)
    np.testing.assert_array_equal(gaussian.covariance, SIGMA)
    assert (gaussian.n, found) == (n, protocol)


def test_ours_opens_elsewhere_without_pickle(tmp_path):
    write_npz(tmp_path / "ours.npz", STATS.gaussian, PROTOCOL)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as arrays:
        assert (arrays["mu"].dtype, arrays["sigma"].dtype) == (np.float64, np.float64)
        assert (arrays["mu"].shape, arrays["sigma"].shape) == ((6,), (6, 6))
        assert arrays["n"] == 50
        assert json.loads(str(arrays["protocol"])) == dataclasses.asdict(PROTOCOL)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    "others",
    [
        {},  # EDM, pytorch-fid
        {"mu_s": np.zeros(3), "sigma_s": np.zeros((3, 3))},  # ADM
        {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "mu_s": np.zeros(3), "sigma_s": np.eye(3)},
        {"labels": np.array([None, {}], dtype=object)},  # never looked at
    ],
)
@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_files_of_other_projects_are_read(tmp_path, dtype, others, savez):
    path = tmp_path / "stats.npz"
    savez(path, mu=MU.astype(dtype), sigma=SIGMA.astype(dtype), **others)
    gaussian, protocol = read_npz(path)
    assert (gaussian.n, protocol) == (None, None)
    assert gaussian.mean.dtype == gaussian.covariance.dtype == np.float64
    np.testing.assert_allclose(gaussian.covariance, SIGMA, rtol=1e-6, atol=1e-7)
    assert frechet_distance(gaussian, STATS) == pytest.approx(0, abs=1e-12)


def test_rounding_between_the_triangles_is_averaged(tmp_path):
    sigma = changed(SIGMA, (1, 2), SIGMA[1, 2] + 1e-7)
    gaussian, _ = read_npz(save(tmp_path, mu=MU, sigma=sigma))
    np.testing.assert_array_equal(gaussian.covariance, gaussian.covariance.T)
    assert gaussian.covariance[2, 1] == pytest.approx(SIGMA[1, 2] + 5e-8, abs=1e-12)


BROKEN = {
    "no mu": ({"sigma": SIGMA}, "no key mu .found sigma"),
    "images": ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "no key mu and sigma .found arr_0"),
    "empty": ({}, "found nothing"),
    "flat sigma": ({"mu": MU, "sigma": SIGMA.ravel()}, r"mu \(6,\) and sigma \(36,\)"),
    "mu of two axes": ({"mu": MU[None], "sigma": SIGMA}, r"mu \(1, 6\)"),
    "other D": ({"mu": MU[:5], "sigma": SIGMA}, r"mu \(5,\) and sigma \(6, 6\)"),
    "no features": ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, r"mu \(0,\)"),
    "asymmetric": (
        {"mu": MU, "sigma": changed(SIGMA, (1, 2), SIGMA[1, 2] + 1e-4)},
        "sigma is not symmetric",
    ),
    "negative": ({"mu": MU, "sigma": changed(SIGMA, (3, 3), -1e-3)}, "negative variances"),
    "nan in mu": ({"mu": changed(MU, 0, np.nan), "sigma": SIGMA}, "mu has values that are not fin"),
    "inf in sigma": (
        {"mu": MU, "sigma": changed(SIGMA, (0, 0), np.inf)},
        "sigma has values that are not finite",
    ),
    "whole numbers": ({"mu": MU.astype(int), "sigma": SIGMA}, "mu is int64: save it as float64"),
    "half": ({"mu": MU, "sigma": SIGMA.astype(np.float16)}, "sigma is float16"),
    "complex": ({"mu": MU, "sigma": SIGMA.astype(complex)}, "sigma is complex128"),
    "pickle": ({"mu": MU.astype(object), "sigma": SIGMA}, "unreadable .*pickle|Object arrays"),
    "pickled n": ({"mu": MU, "sigma": SIGMA, "n": np.array(None)}, "unreadable"),
    "long header": (
        {"mu": np.zeros(2, [(f"field {i}", "f8") for i in range(1_000)]), "sigma": SIGMA},
        "unreadable .*Header",
    ),
    "n of none": ({"mu": MU, "sigma": SIGMA, "n": 0}, "n must be one whole number"),
    "n of a half": ({"mu": MU, "sigma": SIGMA, "n": 50.5}, "n must be one whole number"),
    "many n": ({"mu": MU, "sigma": SIGMA, "n": [5, 5]}, "n must be one whole number"),
    "protocol no JSON": ({"mu": MU, "sigma": SIGMA, "protocol": "fid"}, "protocol is not one"),
    "protocol a list": ({"mu": MU, "sigma": SIGMA, "protocol": "[1]"}, "protocol is not one"),
    "protocol unknown": (
        {"mu": MU, "sigma": SIGMA, "protocol": '{"network": "x"}'},
        "protocol is not one of this version",
    ),
    "protocol of other D": (
        {
            "mu": MU,
            "sigma": SIGMA,
            "protocol": json.dumps(dataclasses.asdict(dataclasses.replace(PROTOCOL, dim=7))),
        },
        "6 features where its protocol says 7",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_statistics_are_refused_in_one_line_with_file_and_key(tmp_path, case):
    arrays, reason = BROKEN[case]
    path = save(tmp_path, **arrays)
    with pytest.raises(ValueError, match=reason) as refused:
        read_npz(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def whole_file(folder):
    return save(folder, mu=MU, sigma=SIGMA).read_bytes()


def flipped(data):
    """One byte inside sigma: the archive's checksum no longer fits."""
    position = data.index(SIGMA.tobytes()) + 40
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def deflated_wrongly(data):
    """The compressed stream of sigma begins with a block of a kind that does not exist."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    member = io.BytesIO()
    with zipfile.ZipFile(member, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
        offset = copy.getinfo("sigma.npy").header_offset + 30 + len("sigma.npy")
    data = bytearray(member.getvalue())
    data[offset] |= 0b110
    return bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "not an .npz file, or cut short"),
        (lambda data: b"", "not an .npz file"),
        (lambda data: b"\x80\x04N.", "not an .npz file"),  # a pickle
        (flipped, "unreadable .*CRC"),
        (deflated_wrongly, "unreadable .*block"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, reason):
    path = tmp_path / "damaged.npz"
    path.write_bytes(damage(whole_file(tmp_path)))
    with pytest.raises(ValueError, match=reason) as refused:
        read_npz(path)
    assert "\n" not in str(refused.value)


def test_other_archives_and_single_arrays_are_refused(tmp_path):
    np.save(tmp_path / "mu.npy", MU)
    with pytest.raises(ValueError, match="not an"):
        read_npz(tmp_path / "mu.npy")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("mu.npy", b"not an array")
        archive.writestr("sigma", b"neither")
    with pytest.raises(ValueError, match=r"text\.npz: "):
        read_npz(tmp_path / "text.npz")


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "none.npz")
