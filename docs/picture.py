"""The picture at the top of the README, from a finished workspace:

python docs/picture.py cmforge-workspace docs/quickstart.png
"""

import sys
from pathlib import Path

import numpy as np

from pipelines import dag, png

ROWS = ("teacher-18", "distill-1", "isolate-1")
COLUMNS = 20


def main(workspace: str, out: str) -> None:
    record = dag.latest_record("evaluate", workspace)
    assert record is not None, f"no evaluation in {workspace}"
    home = Path(workspace, "steps", "evaluate", record["fingerprint"], "attempts")
    samples = np.load(home / record["attempt"] / "samples.npz", allow_pickle=False)
    tiles = np.concatenate([samples[row][:COLUMNS] for row in ROWS])
    scale = png.tile_scale(int(tiles.shape[1]))
    Path(out).write_bytes(png.encode_png(png.grid(tiles, COLUMNS, scale=scale)))


if __name__ == "__main__":
    main(*sys.argv[1:])
