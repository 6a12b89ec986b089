"""Frechet distances between real image sets, against figures measured with independent code.

python docs/anchors.py DATA [--full]

DATA holds cifar10/ (sheets), fashion-mnist/ (idx) and weights/. Prints what the extractors here
make of it, the anchor and the relative difference, and exits with 1 where that is above 1e-3: the
room that CPU kernels and the memory layout need. Without --full only the rows of one minute.

The networks are proxies: none of these numbers is a FID. GoogLeNet's anchors were measured with
its weights in float32, and hold for the half-precision file to 2e-4.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consistency.evaluation.extractors import Extractor, load_extractor
from consistency.evaluation.frechet import GaussianStats, frechet_distance
from consistency.evaluation.specs import SPECS
from infra.sources import open_source

TOLERANCE = 1e-3  # relative
CHUNK = 1_000  # images whose features are kept for other rows

Images = NDArray[np.uint8]
Part = tuple[str, int, int]  # source, first image, image past the last

TRAIN, TEST = "cifar10 train", "cifar10 test"
F_TRAIN, F_TEST = "fashion train", "fashion test"
A, B = (TRAIN, 0, 5_000), (TRAIN, 5_000, 10_000)
A1, A2 = (TRAIN, 0, 1_000), (TRAIN, 0, 2_000)
SQUEEZE, GOOGLE, RESNET = "squeezenet11", "googlenet_bvlc", "resnet56_cifar10"


class Row(NamedTuple):
    """A distance between two sets; `other` None: the trace of one set's covariance."""

    network: str
    one: Part
    other: Part | None
    anchor: float
    quick: bool = False


ROWS = (
    Row(SQUEEZE, A, None, 7653.8987),
    Row(SQUEEZE, A1, B, 497.088031, quick=True),
    Row(SQUEEZE, A2, B, 288.486363),
    Row(SQUEEZE, A, B, 167.587859),
    Row(SQUEEZE, (TRAIN, 0, 10_000), (TEST, 0, 1_000), 439.301103),
    Row(SQUEEZE, (F_TRAIN, 0, 5_000), (F_TEST, 0, 5_000), 126.298627),
    Row(SQUEEZE, (F_TRAIN, 0, 1_000), (F_TEST, 0, 5_000), 361.924563),
    Row(SQUEEZE, A, (F_TRAIN, 0, 5_000), 11063.150554),
    Row(GOOGLE, A, None, 4419.9118),
    Row(GOOGLE, A1, B, 571.588488),
    Row(GOOGLE, A2, B, 321.039720),
    Row(GOOGLE, A, B, 188.474134),
    Row(GOOGLE, (F_TRAIN, 0, 2_000), (F_TEST, 0, 2_000), 217.688824),
    Row(GOOGLE, A2, (F_TRAIN, 0, 2_000), 3944.214714),
    Row(RESNET, A, None, 39.4685),
    Row(RESNET, A1, B, 0.167203),
    Row(RESNET, A2, B, 0.094406),
    Row(RESNET, A, B, 0.075495),
    Row(RESNET, A, (TEST, 0, 1_000), 0.220594),
)


def measurer(data: Path) -> Callable[[Row], float]:
    """Measures rows; images and features are read and made once."""

    @functools.cache
    def images(source: str) -> Images:
        folder, split = source.split()
        kind, path = ("sheets", "cifar10") if folder == "cifar10" else ("idx", "fashion-mnist")
        found = open_source(
            kind, str(data / path), size=None, fit="crop", limit=10_000, split=split
        )
        return np.stack([image for image, _ in found.samples()])

    @functools.cache
    def extractor(network: str) -> Extractor:
        return load_extractor(network, data / "weights" / SPECS[network].file)

    @functools.cache
    def chunk(network: str, source: str, start: int) -> NDArray[np.float32]:
        return extractor(network)(images(source)[start : start + CHUNK]).pooled

    @functools.cache
    def statistics(network: str, part: Part) -> GaussianStats:
        source, start, stop = part
        parts = [chunk(network, source, at) for at in range(start, stop, CHUNK)]
        return GaussianStats.from_features(np.concatenate(parts))

    def measure(row: Row) -> float:
        one = statistics(row.network, row.one)
        if row.other is None:
            return float(np.trace(one.covariance))
        return frechet_distance(one, statistics(row.network, row.other))

    return measure


def described(part: Part | None) -> str:
    if part is None:
        return "trace of the covariance"
    source, start, stop = part
    return f"{source}[{start}:{stop}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--full", action="store_true", help="all rows: about ten minutes")
    options = parser.parse_args()
    measure = measurer(options.data)
    far = 0
    print(f"{'':74} {'measured':>14} {'anchor':>14} {'difference':>10}")
    for row in ROWS:
        if not (row.quick or options.full):
            continue
        value = measure(row)
        difference = value / row.anchor - 1
        far += abs(difference) > TOLERANCE
        what = f"{row.network:16} {described(row.one):30} {described(row.other):26}"
        print(f"{what} {value:14.6f} {row.anchor:14.6f} {difference:+10.1e}", flush=True)
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
