"""A model as one program file that needs nothing of cmforge: ONNX, or torch.export's pt2.

It is D(x, sigma[, labels]), f(x, sigma[, labels]) or u(z, t, t_minus_r[, labels]), on a batch of
any size; `labels` are there where the model has classes, and -1 is no class. How to sample with it
is in its metadata.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from consistency.published import ModelDescription, PublishedModel
from infra.errors import UserError

SHOWN_STEPS = (1, 2, 4, 8)
LARGEST_ONNX = 1_900_000_000  # bytes of weights in the file itself; a protobuf ends at 2 GiB
METADATA = "cmforge.json"


def write_pt2(model: PublishedModel, file: Path) -> None:
    """A program for `torch.export.load`; its extra file `cmforge.json` holds the metadata."""
    batch = torch.export.Dim("batch", min=1)
    inputs = _inputs(model.description)
    with _quiet():
        program = torch.export.export(
            _plain(model),
            (),
            kwargs=inputs,
            dynamic_shapes={name: {0: batch} for name in inputs},
        )
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:  # where on this machine each line of ours lies
                node.meta.pop("stack_trace", None)
    extra = {METADATA: json.dumps(metadata(model.description), sort_keys=True)}
    torch.export.save(program, file, extra_files=extra)


def write_onnx(model: PublishedModel, file: Path) -> None:
    """A program for onnxruntime; weights beyond a protobuf's size lie in `file`.data beside it."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx: needs {' and '.join(missing)}; pip install 'cmforge[onnx]'"
        )
    inputs = _inputs(model.description)
    with _quiet():
        program = torch.onnx.export(
            _plain(model),
            (),
            kwargs=inputs,
            output_names=["output"],
            dynamic_shapes={name: {0: "batch"} for name in inputs},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:  # where on this machine each line of ours lies
        node.metadata_props.clear()
    program.model.graph.metadata_props.clear()
    for key, value in sorted(metadata(model.description).items()):
        text = value if isinstance(value, str) else json.dumps(value)
        program.model.metadata_props[f"cmforge.{key}"] = text
    size = sum(v.numel() * v.element_size() for v in model.function.state_dict().values())
    program.save(str(file), external_data=size > LARGEST_ONNX)


def metadata(description: ModelDescription) -> dict[str, Any]:
    """What a caller must know to sample: the levels of each number of steps, and what they are."""
    about = description
    levels = {str(steps): about.levels(steps) for steps in SHOWN_STEPS}
    return {
        "kind": about.kind,
        "sampler": about.sampler,
        "size": about.size,
        "channels": about.channels,
        "class_names": list(about.class_names) if about.num_classes else [],
        "sigma_min": about.noise.sigma_min,
        "sigma_max": about.noise.sigma_max,
        "rho": about.noise.rho,
        "boundary": about.boundary,
        "levels": {} if about.kind == "denoiser" else levels,
    }


def input_names(description: ModelDescription) -> list[str]:
    """Arguments of the program: x or z float32 [B, C, H, W], labels int64 [B], others float32."""
    levels = ["z", "t", "t_minus_r"] if description.kind == "mean_flow" else ["x", "sigma"]
    return levels + (["labels"] if description.num_classes else [])


def _inputs(description: ModelDescription) -> dict[str, torch.Tensor]:
    """An example of each: two rows, as a batch of one is a special case."""
    about = description
    images = torch.zeros(2, about.channels, about.size, about.size)
    known = {"x": images, "z": images, "labels": torch.tensor([0, -1])}
    return {name: known.get(name, torch.tensor([0.9, 0.8])) for name in input_names(about)}


def _plain(model: PublishedModel) -> torch.nn.Module:
    """On the CPU, in the memory format that every runtime knows."""
    function = model.function.eval().to("cpu")
    return function.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporters talk of their own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
