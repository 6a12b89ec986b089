"""The FID network here against torch-fidelity's, in images per CPU second.

pip install torch-fidelity
python docs/bench_features.py [--rounds 9] [--batch 32] [--threads 2]

Weights are random, which costs the same. The two take turns on the same 32x32 images, resize
included; what is said is the median of the rounds' ratios, for the machine may be shared.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from consistency.evaluation.extractors import load_extractor
from consistency.evaluation.inception import InceptionV3
from consistency.evaluation.specs import SPECS


def random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in InceptionV3().state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        scale = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.1
        weights[name] = values * scale
        if name.endswith(("running_var", "bn.weight")):
            weights[name] = values.abs() + 0.5
    return weights


def theirs(file: Path) -> Callable[[torch.Tensor], object]:
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # torchvision's wheel for CUDA wants two operators beside a CPU torch; nobody calls them.
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    )

    def run(pixels: torch.Tensor) -> object:
        with torch.no_grad():
            return network(pixels)

    run.library = library  # type: ignore[attr-defined]  # it must outlive the operators' use
    return run


def cpu_seconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    images = np.random.default_rng(0).integers(0, 256, (options.batch, 32, 32, 3), np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(random_weights(), file)
        # Random weights are not the pinned ones; here alone they may stand in for them.
        SPECS["inception_fid"] = replace(SPECS["inception_fid"], sha256=None, bytes=None)
        ours = load_extractor("inception_fid", file)
        other = theirs(file)

    ours(images)
    other(pixels)
    rows = []
    for _ in range(options.rounds):
        fast, slow = cpu_seconds(lambda: ours(images)), cpu_seconds(lambda: other(pixels))
        rows.append((options.batch / fast, options.batch / slow, slow / fast))
        print(f"{rows[-1][0]:6.2f} {rows[-1][1]:6.2f} {rows[-1][2]:6.2f}", flush=True)
    here, there, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"images per CPU second: {here:.2f} here, {there:.2f} torch-fidelity; ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
