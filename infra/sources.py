"""Readers of real images: each kind of source becomes a header and a repeatable stream.

Images are uint8 HWC with 1 or 3 channels, all of one square size; labels are class indices.
Every error is one line that names the recipe key, the file and the mend.
"""

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from infra import cifar10, storage
from infra.errors import UserError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
Fit = Literal["crop", "pad"]

TILE = 32  # side of one image in a sheet, in pixels
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Source:
    """Header of a stream of (image uint8 [height, width, channels], class index).

    `samples()` starts the stream anew, in the same order each time.
    """

    name: str
    count: int
    height: int
    width: int
    channels: int
    class_names: tuple[str, ...]
    samples: Callable[[], Iterator[tuple[Pixels, int]]]


def open_source(
    kind: str,
    path: str | None,
    *,
    size: int | None,
    fit: Fit,
    labels: str | None = None,
    limit: int | None = None,
    split: str = "train",
) -> Source:
    """Opens real images and checks their header.

    kind    digits | idx | folder | npz | cifar10 | sheets
    path    folder or file, local or any fsspec URL; None for the embedded digits
    size    side in pixels after `fit`; None keeps the source's own (square) size
    fit     crop: centre square, resized (Lanczos); pad: zeros around the centre
    labels  npz: name of the label array; sheets: name of the label file
    limit   array kinds: the first so many; folder: so many spread evenly over the sorted files
    split   train | test, for idx, cifar10 and sheets

    Raises UserError for every input a user can mend.
    """
    if fit not in ("crop", "pad"):
        raise UserError(f"data.fit: {fit!r} is unknown; use crop or pad")
    if limit is not None and limit < 1:
        raise UserError(f"data.limit: {limit} must be at least 1")
    if split not in ("train", "test"):
        raise UserError(f"data.split: {split!r} is unknown; use train or test")
    if split == "test" and kind in ("digits", "folder", "npz"):
        raise UserError(f"data.split: source {kind} has no test split; use train")
    if labels is not None and kind not in ("npz", "sheets"):
        raise UserError(f"data.labels: source {kind} brings its own labels; leave it out")
    if kind == "digits":
        if path is not None:
            raise UserError(f"data.path: source digits is embedded and takes none (got {path})")
        return _array_source(kind, "digits", *_read_digits(), size, fit, limit)
    if kind not in ("idx", "folder", "npz", "cifar10", "sheets"):
        known = "digits, idx, folder, npz, cifar10 or sheets"
        raise UserError(f"data.source: {kind!r} is unknown; use {known}")
    if path is None:
        raise UserError(f"data.path: source {kind} needs one; give a folder, file or URL")
    path = storage.absolute(path)
    if not storage.exists(path):
        raise UserError(f"data.path: {path} does not exist; check the spelling or mount it")
    if kind == "folder":
        return _folder_source(path, size, fit, limit)
    if kind == "idx":
        images, classes, names = _read_idx(path, split)
    elif kind == "npz":
        images, classes, names = _read_npz(path, labels)
    elif kind == "cifar10":
        images, classes = cifar10.read(path, split)
        names = cifar10.CLASSES
    else:
        images, classes, names = _read_sheets(path, split, labels)
    return _array_source(kind, path, images, classes, names, size, fit, limit)


def files_of(
    kind: str, path: str, split: str = "train", labels: str | None = None
) -> list[tuple[str, int]]:
    """(relative path, bytes) of the files `open_source` reads, sorted; "" is `path` itself.

    What else lies there (notes, thumbnails, hidden files) is left out. Empty when there are none.
    """
    if kind == "npz" or (kind == "cifar10" and path.endswith(cifar10.ARCHIVES)):
        return [("", storage.size(path))]
    names = {
        "folder": r"(?i)([^./][^/]*/)*[^./][^/]*\.(png|jpe?g|webp)",
        "idx": ("train" if split == "train" else "t10k")
        + r"-(images-idx3|labels-idx1)-ubyte(\.gz)?",
        "cifar10": rf"({'|'.join(cifar10.FOLDERS)})/?({'|'.join(cifar10.batches(split))})(\.bin)?",
        "sheets": f"{_sheet_names(split)}|{re.escape(labels or 'labels.npy')}",
    }[kind]
    return [(name, size) for name, size in storage.list_files(path) if re.fullmatch(names, name)]


# --- from pixels to one size -------------------------------------------------------------------


def fit_image(image: Pixels, size: int, fit: Fit, where: str) -> Pixels:
    """[h, w, c] -> [size, size, c]; an image of the right size passes untouched."""
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image
    if fit == "pad":
        if height > size or width > size:
            raise UserError(
                f"data.size: {where} is {height}x{width}, too large to pad to {size}; "
                f"raise data.size or set data.fit=crop"
            )
        padded = np.zeros((size, size, channels), np.uint8)
        top, left = (size - height) // 2, (size - width) // 2
        padded[top : top + height, left : left + width] = image
        return padded
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side == size:
        return square
    picture = Image.fromarray(square[:, :, 0] if channels == 1 else square)
    resized = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))
    return resized.reshape(size, size, channels)


def _array_source(
    kind: str,
    where: str,
    images: Pixels,
    labels: Labels,
    class_names: tuple[str, ...],
    size: int | None,
    fit: Fit,
    limit: int | None,
) -> Source:
    images, labels = np.ascontiguousarray(images[:limit]), labels[:limit]
    count, height, width, channels = images.shape
    if count == 0:
        raise UserError(f"data.path: {where} holds no images; give one that does")
    if size is None and height != width:
        raise UserError(f"data.size: {where} is {height}x{width}, not square; give data.size")
    side = size or height
    fit_image(images[0], side, fit, where)  # a size that cannot be reached is refused at once

    def samples() -> Iterator[tuple[Pixels, int]]:
        for image, label in zip(images, labels, strict=True):
            yield fit_image(image, side, fit, where), int(label)

    return Source(kind, count, side, side, channels, class_names, samples)


# --- array kinds: (images [N, H, W, C], labels [N], class names) ---------------------------------


def _read_digits() -> tuple[Pixels, Labels, tuple[str, ...]]:
    from sklearn.datasets import load_digits

    digits = load_digits()  # values 0..16
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return images[..., None], digits.target.astype(np.int64), tuple("0123456789")


def _read_idx(path: str, split: str) -> tuple[Pixels, Labels, tuple[str, ...]]:
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx_file(path, f"{prefix}-images", 3)
    labels = _read_idx_file(path, f"{prefix}-labels", 1)
    if len(images) != len(labels):
        raise UserError(
            f"data.path: {path} has {len(images)} {split} images but {len(labels)} labels; "
            f"fetch both files again"
        )
    return images[..., None], labels.astype(np.int64), _numbered(labels)


def _read_idx_file(folder: str, stem: str, dimensions: int) -> Pixels:
    """One unsigned-byte idx file: 0, 0, 8, dimensions, then each extent as big-endian int32."""
    base = f"{stem}-idx{dimensions}-ubyte"
    wanted = [base + ".gz", base]
    names = [name for name in wanted if name in storage.list_dir(folder)]
    if not names:
        raise UserError(f"data.path: {folder} has no {base}.gz; give the folder of the idx files")
    url = storage.join(folder, names[0])
    data = storage.read_bytes(url)
    if names[0].endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except _UNREADABLE as error:
            raise UserError(f"data.path: {url} is damaged ({error}); fetch it again") from error
    if len(data) < 4 + 4 * dimensions or data[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(
            f"data.path: {url} starts with {data[:4].hex() or 'nothing'}, not the idx magic "
            f"{bytes([0, 0, 8, dimensions]).hex()}; fetch it again"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", dimensions, 4))
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if values.size != int(np.prod(shape, dtype=object)):
        raise UserError(
            f"data.path: {url} holds {values.size} bytes, its header promises {shape}; "
            f"fetch it again"
        )
    return values.reshape(shape)


def _read_npz(path: str, labels_key: str | None) -> tuple[Pixels, Labels, tuple[str, ...]]:
    data = storage.read_bytes(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array, not an .npz archive")
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own for damaged input
        raise UserError(f"data.path: {path} is not a readable .npz ({error})") from error
    if "images" not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise UserError(f"data.path: {path} has no array 'images' (found: {found}); name it so")
    images = arrays["images"]
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"data.path: images in {path} are {images.dtype} {images.shape}; "
            f"give uint8 [N, H, W] or [N, H, W, 1 or 3]"
        )
    if labels_key is not None and labels_key not in arrays:
        found = ", ".join(arrays)
        raise UserError(f"data.labels: {path} has no array {labels_key!r} (found: {found})")
    if (labels_key or "labels") not in arrays:
        return images, np.zeros(len(images), np.int64), ("images",)
    labels = _checked_labels(arrays[labels_key or "labels"], len(images), path)
    return images, labels, _numbered(labels)


def _read_sheets(
    path: str, split: str, labels_file: str | None
) -> tuple[Pixels, Labels, tuple[str, ...]]:
    """Lossless mosaics, tiles row by row; the label file holds train labels, then test labels."""
    names = [name for name in storage.list_dir(path) if re.fullmatch(_sheet_names(split), name)]
    if not names:
        raise UserError(f"data.path: {path} has no {split}_*.webp or .png; give a sheet folder")
    sheets = [_read_sheet(storage.join(path, name)) for name in names]
    channels = [sheet.shape[3] for sheet in sheets]
    if len(set(channels)) > 1:
        other = next(i for i, found in enumerate(channels) if found != channels[0])
        raise _mixed(path, names[0], channels[0], names[other], channels[other])
    images = np.concatenate(sheets)
    file = storage.join(path, labels_file or "labels.npy")
    try:
        every = np.load(io.BytesIO(storage.read_bytes(file)), allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"data.labels: {file} does not exist; put the label array there") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"data.labels: {file} is not a readable .npy ({error})") from error
    own = every[: len(images)] if split == "train" else every[-len(images) :]
    return images, _checked_labels(own, len(images), file), _numbered(every)


def _sheet_names(split: str) -> str:
    return rf"{split}_.*\.(webp|png)"


def _read_sheet(url: str) -> Pixels:
    sheet = _decode(storage.read_bytes(url), url)
    height, width, channels = sheet.shape
    if height % TILE or width % TILE:
        raise UserError(f"data.path: {url} is {height}x{width}, not whole {TILE}x{TILE} tiles")
    tiles = sheet.reshape(height // TILE, TILE, width // TILE, TILE, channels)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(-1, TILE, TILE, channels)


def _checked_labels(labels: Any, count: int, where: str) -> Labels:
    array = np.asarray(labels if labels is not None else [])
    if array.shape != (count,) or array.dtype.kind not in "iu" or (count and array.min() < 0):
        raise UserError(
            f"data.path: labels of {where} are {array.dtype} {array.shape}; "
            f"give {count} integers from 0"
        )
    return array.astype(np.int64)


def _numbered(labels: NDArray[Any]) -> tuple[str, ...]:
    return tuple(str(i) for i in range(int(labels.max()) + 1)) if labels.size else ()


# --- folders of image files ----------------------------------------------------------------------


def _folder_source(root: str, size: int | None, fit: Fit, limit: int | None) -> Source:
    if size is None:
        raise UserError("data.size: source folder needs the side in pixels (data.size=32)")
    files = [path for path, _ in files_of("folder", root)]
    if not files:
        raise UserError(f"data.path: {root} has no PNG, JPEG or WebP files; give a folder of them")
    loose = [path for path in files if "/" not in path]
    if loose and len(loose) < len(files):
        raise UserError(
            f"data.path: {root} has images both in sub-folders and outside ({loose[0]}); "
            f"move each into its class's folder"
        )
    class_names = tuple(sorted({path.split("/")[0] for path in files}))
    class_names = ("images",) if loose else class_names
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    first = _decode(storage.read_bytes(storage.join(root, files[0])), files[0])
    channels = first.shape[2]

    def samples() -> Iterator[tuple[Pixels, int]]:
        for path in files:
            url = storage.join(root, path)
            image = _decode(storage.read_bytes(url), url)
            if image.shape[2] != channels:
                raise _mixed(root, files[0], channels, path, image.shape[2])
            label = 0 if loose else class_names.index(path.split("/")[0])
            yield fit_image(image, size, fit, url), label

    return Source("folder", len(files), size, size, channels, class_names, samples)


def _decode(data: bytes, where: str) -> Pixels:
    """An image file's pixels, upright, as [h, w, 1 or 3]; palettes become RGB."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except _UNREADABLE as error:
        raise UserError(
            f"data.path: {where} is not a readable image ({error}); replace or remove it"
        ) from error
    if upright.mode == "1":
        upright = upright.convert("L")
    if upright.mode == "P" and "transparency" not in upright.info:
        upright = upright.convert("RGB")
    if upright.mode not in ("L", "RGB"):
        raise UserError(
            f"data.path: {where} is {upright.mode}, neither grey nor RGB of 8 bits; convert it "
            f"(there is no one right background or colour profile)"
        )
    pixels = cast(Pixels, np.asarray(upright))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _mixed(root: str, first: str, channels: int, second: str, others: int) -> UserError:
    return UserError(
        f"data.path: {root} mixes channel counts: {first} has {channels}, {second} has {others}; "
        f"convert them to one"
    )
