"""scikit-learn's digits in colour: on which a small model learns in minutes what colours mean.

python docs/tint.py digits.npz

Each class has a hue of its own for the strokes and the opposite one, dark, for the ground. Writes
`images` uint8 [1797, 8, 8, 3] and `labels`.
"""

import colorsys
import sys

import numpy as np

from infra import sources


def main() -> None:
    pairs = list(sources.open_source("digits", None, size=None, fit="crop").samples())
    labels = np.array([label for _, label in pairs])
    ink = np.array([colorsys.hsv_to_rgb(c / 10, 0.8, 1.0) for c in range(10)])
    ground = np.array([colorsys.hsv_to_rgb((c / 10 + 0.5) % 1, 0.9, 0.35) for c in range(10)])
    share = np.stack([image for image, _ in pairs]).astype(float)[..., :1] / 255
    rgb = share * ink[labels][:, None, None] + (1 - share) * ground[labels][:, None, None]
    np.savez_compressed(sys.argv[1], images=np.rint(255 * rgb).astype(np.uint8), labels=labels)


if __name__ == "__main__":
    main()
