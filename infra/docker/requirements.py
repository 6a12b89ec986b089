"""Print the dependencies pyproject.toml declares: the image's layer of packages needs no code."""

import sys
import tomllib
from pathlib import Path

print("\n".join(tomllib.loads(Path(sys.argv[1]).read_text())["project"]["dependencies"]))
