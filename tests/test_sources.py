"""Every kind of source on small real files, and one clear line for each thing that can be wrong."""

import gzip
import hashlib
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from infra import storage
from infra.cifar10 import CLASSES
from infra.errors import UserError
from infra.sources import Source, files_of, fit_image, open_source

DATA = Path(os.environ.get("CMFORGE_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
RNG = np.random.default_rng(0)


def read(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels, checked against the header."""
    images, labels = zip(*source.samples(), strict=True)
    stacked = np.stack(images)
    assert stacked.shape == (source.count, source.height, source.width, source.channels)
    assert stacked.dtype == np.uint8
    assert 0 <= min(labels) <= max(labels) < len(source.class_names)
    return stacked, np.array(labels)


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, zipped: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    for stem, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        data = header + array.astype(np.uint8).tobytes()
        name = f"train-{stem}-ubyte"
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)


def write_cifar(folder: Path, images: np.ndarray, labels: np.ndarray, form: str) -> None:
    """Five train batches of equal length in the official layout."""
    folder.mkdir(exist_ok=True)
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for i, (part, own) in enumerate(
        zip(np.split(rows, 5), np.split(labels, 5), strict=True), start=1
    ):
        if form == "binary":
            data = np.concatenate([own[:, None].astype(np.uint8), part], axis=1).tobytes()
            (folder / f"data_batch_{i}.bin").write_bytes(data)
        else:
            batch = {b"data": part, b"labels": own.tolist(), b"batch_label": b"made for a test"}
            (folder / f"data_batch_{i}").write_bytes(pickle.dumps(batch, protocol=3))


def write_image(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_digits_are_the_scikit_learn_digits_scaled_to_eight_bits() -> None:
    source = open_source("digits", None, size=None, fit="crop")
    images, labels = read(source)
    assert images.shape == (1797, 8, 8, 1)
    assert source.class_names == tuple("0123456789")
    assert images.max() == 255
    assert set(np.unique(images)) == {round(v * 255 / 16) for v in range(17)}
    assert labels[:5].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_pairs_are_read_exactly(tmp_path: Path, zipped: bool) -> None:
    made, classes = RNG.integers(0, 256, (7, 5, 5), np.uint8), np.arange(7) % 3
    write_idx(tmp_path / "idx", made, classes, zipped)
    images, labels = read(open_source("idx", str(tmp_path / "idx"), size=None, fit="crop"))
    np.testing.assert_array_equal(images[..., 0], made)
    np.testing.assert_array_equal(labels, classes)


def test_npz_is_read_with_and_without_labels(tmp_path: Path) -> None:
    made = RNG.integers(0, 256, (6, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=made, kind=np.array([2, 0, 1, 2, 0, 1]))
    plain = open_source("npz", str(tmp_path / "a.npz"), size=None, fit="crop")
    images, labels = read(plain)
    np.testing.assert_array_equal(images, made)
    assert set(labels) == {0}
    named = open_source("npz", str(tmp_path / "a.npz"), size=None, fit="crop", labels="kind")
    assert read(named)[1].tolist() == [2, 0, 1, 2, 0, 1]
    assert named.class_names == ("0", "1", "2")
    np.savez(tmp_path / "grey.npz", images=made[..., 0])
    assert open_source("npz", str(tmp_path / "grey.npz"), size=None, fit="crop").channels == 1


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_batches_are_read_in_order(tmp_path: Path, form: str, packed: bool) -> None:
    made, classes = RNG.integers(0, 256, (10, 32, 32, 3), np.uint8), np.arange(10)[::-1]
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder, made, classes, form)
    path = tmp_path
    if packed:
        path = tmp_path / "cifar-10.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, "cifar-10-batches-py")
    source = open_source("cifar10", str(path), size=None, fit="crop")
    images, labels = read(source)
    np.testing.assert_array_equal(images, made)
    np.testing.assert_array_equal(labels, classes)
    assert source.class_names == CLASSES


def test_sheets_are_cut_row_by_row_and_labels_split_train_then_test(tmp_path: Path) -> None:
    made = RNG.integers(0, 256, (14, 32, 32, 3), np.uint8)
    for name, part in (("train_00", made[:6]), ("train_01", made[6:12]), ("test_00", made[12:])):
        sheet = part.reshape(-1, 2, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 64, 3)
        write_image(tmp_path / f"{name}.webp", sheet, lossless=True)
    np.save(tmp_path / "labels.npy", np.arange(14))
    images, labels = read(open_source("sheets", str(tmp_path), size=None, fit="crop"))
    np.testing.assert_array_equal(images, made[:12])
    assert labels.tolist() == list(range(12))
    images, labels = read(open_source("sheets", str(tmp_path), size=None, fit="crop", split="test"))
    np.testing.assert_array_equal(images, made[12:])
    assert labels.tolist() == [12, 13]


def test_a_folder_gives_its_classes_in_sorted_order(tmp_path: Path) -> None:
    made = RNG.integers(0, 256, (4, 8, 8, 3), np.uint8)
    write_image(tmp_path / "b" / "0.png", made[2])
    write_image(tmp_path / "b" / "1.webp", made[3], lossless=True)
    write_image(tmp_path / "a" / "2.PNG", made[0])
    write_image(tmp_path / "a" / "sub" / "3.png", made[1])
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    source = open_source("folder", str(tmp_path), size=8, fit="crop")
    images, labels = read(source)
    np.testing.assert_array_equal(images, made)
    assert labels.tolist() == [0, 0, 1, 1]
    assert source.class_names == ("a", "b")
    half = open_source("folder", str(tmp_path), size=8, fit="crop", limit=2)
    assert read(half)[1].tolist() == [0, 1]  # a limit keeps every class it can


def test_a_flat_folder_is_one_class_and_jpeg_and_palette_are_read(tmp_path: Path) -> None:
    flat = np.full((8, 12, 3), (200, 30, 90), np.uint8)
    write_image(tmp_path / "a.jpg", flat, quality=100, subsampling=0)
    Image.fromarray(flat).quantize(4).save(tmp_path / "b.png")
    source = open_source("folder", str(tmp_path), size=4, fit="crop")
    images, labels = read(source)
    assert np.abs(images.astype(int) - [200, 30, 90]).max() <= 3
    assert labels.tolist() == [0, 0]
    assert source.class_names == ("images",)


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    write_image(tmp_path / "a.png", pixels, exif=exif)
    images, _ = read(open_source("folder", str(tmp_path), size=4, fit="crop"))
    assert images[0, 3].min() == 255
    assert images[0, 0].max() == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_fitting_crops_the_centre_pads_with_zeros_and_passes_the_right_size(channels: int) -> None:
    image = RNG.integers(1, 256, (28, 28, channels), np.uint8)
    assert fit_image(image, 28, "crop", "x") is image
    padded = fit_image(image, 32, "pad", "x")
    np.testing.assert_array_equal(padded[2:30, 2:30], image)
    assert padded.astype(int).sum() == image.astype(int).sum()
    wide = np.concatenate([np.zeros_like(image), image, np.zeros_like(image)], axis=1)
    np.testing.assert_array_equal(fit_image(wide, 28, "crop", "x"), image)
    flat = np.full((90, 60, channels), 77, np.uint8)
    np.testing.assert_array_equal(
        fit_image(flat, 32, "crop", "x"), np.full((32, 32, channels), 77, np.uint8)
    )


def test_streams_repeat(tmp_path: Path) -> None:
    write_idx(tmp_path, RNG.integers(0, 256, (5, 4, 4), np.uint8), np.arange(5))
    source = open_source("idx", str(tmp_path), size=8, fit="pad")
    for first, second in zip(read(source), read(source), strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_files_of_a_source_are_those_it_reads(tmp_path: Path) -> None:
    """Among everything else that lies around."""
    files = {
        "folder": ["a/1.png", "a/b/2.JPEG", "c.d/3.webp"],
        "idx": ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"],
        "cifar10": ["cifar-10-batches-py/data_batch_2", "data_batch_1.bin"],
        "sheets": ["labels.npy", "train_0.webp", "train_1.png"],
    }
    noise = [".hidden.png", ".git/a.png", "notes.txt", "test_0.webp", "t10k-images-idx3-ubyte.gz"]
    noise += ["cifar-10-batches-py/test_batch", "cifar-10-batches-py/readme.html", "other.npy"]
    for kind, own in files.items():
        for name in [*own, *noise[: 3 if kind == "folder" else None]]:
            storage.write_bytes(str(tmp_path / kind / name), name.encode())
        found = files_of(kind, str(tmp_path / kind))
        assert found == [(name, len(name)) for name in own], kind
    sheets = str(tmp_path / "sheets")
    assert [name for name, _ in files_of("sheets", sheets, "test", "other.npy")] == [
        "other.npy",
        "test_0.webp",
    ]
    archive = str(tmp_path / "cifar.tar.gz")
    storage.write_bytes(archive, b"12")
    assert files_of("cifar10", archive) == files_of("npz", archive) == [("", 2)]
    assert files_of("folder", archive) == []


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/.2.png", ".thumbnails/3.png", "a/.cache/4.png"):
        write_image(tmp_path / name, np.zeros((4, 4), np.uint8))
    source = open_source("folder", str(tmp_path), size=4, fit="crop")
    assert (source.count, source.class_names) == (1, ("a",))


def test_any_fsspec_url_serves(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (4, 4, 3), np.uint8)
    write_image(tmp_path / "cats" / "a.png", pixels)
    storage.upload_dir(str(tmp_path), "memory://pictures")
    images, _ = read(open_source("folder", "memory://pictures", size=4, fit="crop"))
    np.testing.assert_array_equal(images, pixels[None])


# --- what can be wrong ---------------------------------------------------------------------------


def refused(
    match: str,
    kind: str,
    path: Path | str | None,
    size: int | None = None,
    fit: Literal["crop", "pad"] = "crop",
    **options: Any,
) -> None:
    """One line that matches, whether it comes on opening or on reading."""
    with pytest.raises(UserError, match=match) as caught:
        read(open_source(kind, None if path is None else str(path), size=size, fit=fit, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["idx", "folder", "npz", "cifar10", "sheets"])
def test_a_missing_path_and_an_empty_folder_are_named(tmp_path: Path, kind: str) -> None:
    missing = tmp_path / "nowhere"
    refused(f"data.path: {missing} does not exist", kind, missing, 8)
    refused("data.path: source .* needs one", kind, None, 8)
    if kind != "npz":
        refused(f"data.path: {tmp_path} has no ", kind, tmp_path, 8)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    refused("data.source: 'lsun' is unknown", "lsun", tmp_path)
    refused("data.path: source digits is embedded", "digits", tmp_path)
    refused("data.limit: 0", "digits", None, limit=0)
    refused("data.split: 'val'", "digits", None, split="val")
    refused("data.split: source digits has no test split", "digits", None, split="test")
    refused("data.labels: source digits", "digits", None, labels="x")
    refused("data.fit: 'stretch'", "digits", None, fit="stretch")  # type: ignore[arg-type]
    refused("data.size: digits is 8x8, too large to pad to 4", "digits", None, 4, "pad")
    refused("data.size: source folder needs", "folder", tmp_path)
    np.savez(tmp_path / "wide.npz", images=np.zeros((2, 4, 6), np.uint8))
    refused("data.size: .*wide.npz is 4x6, not square", "npz", tmp_path / "wide.npz")


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", RNG.integers(0, 256, (16, 16, 3), np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    damages = {
        "cut.png": whole[: len(whole) // 2],
        "flipped.png": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "page.jpg": b"<html>not found</html>",
        "empty.webp": b"",
    }
    for name, data in damages.items():
        (tmp_path / name).write_bytes(data)
        refused(f"data.path: .*{name} is not a readable image", "folder", tmp_path, 8)
        (tmp_path / name).unlink()
    read(open_source("folder", str(tmp_path), size=8, fit="crop"))


def test_mixed_channel_counts_name_both_files(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    write_image(tmp_path / "b.png", np.zeros((4, 4), np.uint8))
    refused("a.png has 3, b.png has 1", "folder", tmp_path, 4)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("I;16", "png"), ("CMYK", "jpg")]
)
def test_pictures_without_one_right_conversion_are_refused(
    tmp_path: Path, mode: str, suffix: str
) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / f"a.{suffix}")
    refused(f"a.{suffix} is {mode}.* convert it", "folder", tmp_path, 4)


def test_images_inside_and_outside_class_folders_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "cats" / "a.png", np.zeros((4, 4), np.uint8))
    write_image(tmp_path / "b.png", np.zeros((4, 4), np.uint8))
    refused(r"both in sub-folders and outside \(b.png\)", "folder", tmp_path, 4)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def wrong_magic(data: bytes) -> bytes:
    return gzip.compress(b"\0\0\x08\x02" + gzip.decompress(data)[4:])


def short(data: bytes) -> bytes:
    return gzip.compress(gzip.decompress(data)[:-1])


def relabel(data: bytes) -> bytes:
    return gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 4) + bytes(4))


@pytest.mark.parametrize(
    ("stem", "damage", "said"),
    [
        ("images-idx3", cut, "damaged"),
        ("images-idx3", wrong_magic, "not the idx magic 00000803"),
        ("images-idx3", short, "its header promises"),
        ("labels-idx1", relabel, "5 train images but 4 labels"),
        ("labels-idx1", lambda _: gzip.compress(b""), "starts with nothing"),
    ],
)
def test_damaged_idx_files_are_named(
    tmp_path: Path, stem: str, damage: Callable[[bytes], bytes], said: str
) -> None:
    write_idx(tmp_path, RNG.integers(0, 256, (5, 4, 4), np.uint8), np.zeros(5))
    file = tmp_path / f"train-{stem}-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    refused(said, "idx", tmp_path)


def test_bad_npz_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, images=np.zeros((2, 4, 4)))
    refused("a.npz are float64", "npz", file)
    np.savez(file, pictures=np.zeros(1))
    refused("no array 'images' .found: pictures", "npz", file)
    np.savez(file, images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(3, int))
    refused("give 2 integers", "npz", file)
    np.savez(file, images=np.zeros((0, 4, 4), np.uint8))
    refused("holds no images", "npz", file)
    np.savez(file, images=np.array([{}], dtype=object))
    refused("not a readable .npz", "npz", file)  # a pickle inside stays unread
    file.write_bytes(b"PK\3\4 nonsense")
    refused("not a readable .npz", "npz", file)


class Hostile:
    """Runs a command when an ordinary unpickler builds it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_hostile_cifar_pickle_is_refused_by_name_and_runs_nothing(tmp_path: Path) -> None:
    write_cifar(tmp_path, np.zeros((5, 32, 32, 3), np.uint8), np.zeros(5, int), "python")
    trace = tmp_path / "trace"
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Hostile(f"touch {trace}")}))
    refused("data_batch_3 is refused: it asks for (posix|nt).system", "cifar10", tmp_path)
    (tmp_path / "data_batch_3").write_bytes(b"cbuiltins\neval\n(S'1'\ntR.")
    refused("it asks for builtins.eval", "cifar10", tmp_path)
    assert not trace.exists()


def test_bad_cifar_files_are_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, np.zeros((5, 32, 32, 3), np.uint8), np.zeros(5, int), "python")
    batch = tmp_path / "data_batch_2"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-100])
    refused("data_batch_2 is (damaged|refused)", "cifar10", tmp_path)
    batch.write_bytes(pickle.dumps({b"data": [1]}))
    refused("data_batch_2 holds no uint8 rows", "cifar10", tmp_path)
    batch.write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}, protocol=3))
    refused("data_batch_2 has no label", "cifar10", tmp_path)
    batch.unlink()
    refused("has no data_batch_2", "cifar10", tmp_path)
    batch.with_suffix(".bin").write_bytes(bytes(3072))
    refused("not whole records of 3073", "cifar10", tmp_path)
    (tmp_path / "c.tar.gz").write_bytes(b"not a tar")
    refused("c.tar.gz is damaged", "cifar10", tmp_path / "c.tar.gz")


def test_bad_sheets_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "train_0.png", np.zeros((32, 64), np.uint8))
    refused("data.labels: .*labels.npy does not exist", "sheets", tmp_path)
    np.save(tmp_path / "labels.npy", np.arange(1))
    refused("give 2 integers", "sheets", tmp_path)
    write_image(tmp_path / "train_1.png", np.zeros((32, 50), np.uint8))
    refused("train_1.png is 32x50, not whole 32x32 tiles", "sheets", tmp_path)
    write_image(tmp_path / "train_1.png", np.zeros((32, 32, 3), np.uint8))
    refused("train_0.png has 1, train_1.png has 3", "sheets", tmp_path)


# --- the real thing ------------------------------------------------------------------------------


@pytest.mark.skipif(not (DATA / "fashion-mnist").is_dir(), reason=f"no fashion-mnist in {DATA}")
def test_fashion_mnist_is_read_whole_and_padded() -> None:
    path = str(DATA / "fashion-mnist")
    source = open_source("idx", path, size=32, fit="pad", split="test")
    images, labels = read(source)
    assert images.shape == (10_000, 32, 32, 1)
    assert np.bincount(labels).tolist() == [1000] * 10
    raw = gzip.decompress((Path(path) / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert images[:, 2:30, 2:30].tobytes() == raw[16:]
    assert images.sum() == np.frombuffer(raw[16:], np.uint8).sum()  # the border is black


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason=f"no cifar10 sheets in {DATA}")
def test_cifar10_sheets_are_the_official_training_images() -> None:
    source = open_source("sheets", str(DATA / "cifar10"), size=None, fit="crop")
    digest = hashlib.sha256()
    labels = []
    for image, label in source.samples():
        digest.update(image.tobytes())
        labels.append(label)
    known = "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a"
    assert digest.hexdigest() == known
    assert np.bincount(labels).tolist() == [5000] * 10
