"""A folder that `diffusers.ConsistencyModelPipeline` loads, written and read.

    model_index.json
    unet/config.json, unet/diffusion_pytorch_model.safetensors
    unet/cmforge_unet.py             only for networks that UNet2DModel cannot hold
    scheduler/scheduler_config.json
    cmforge.json                     our description, and the noise levels of 1, 2, 4, 8 steps
    README.md                        the lines to sample with

What is read was written by others: nothing in it is run, only safetensors are opened, and a name in
it is never followed out of the folder.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from consistency.published import ModelDescription

WEIGHTS = "diffusion_pytorch_model.safetensors"
CODE, CLASS = "cmforge_unet", "CmforgeUNet"
SCHEDULER = "CMStochasticIterativeScheduler"
OTHERS = "export it as safetensors, onnx or pt2"
SHOWN_STEPS = (1, 2, 4, 8)
MAX_JSON = 4 << 20  # bytes of a JSON file
MAX_INDEX = 64 << 20  # of the list of tensors of a large model

Json = dict[str, Any]


# --- writing ----------------------------------------------------------------------------------


def write_folder(
    folder: Path, description: "ModelDescription", weights: Mapping[str, "Tensor"]
) -> bool:
    """Write a model; returns whether it holds code of its own. UserError for what cannot be one."""
    from safetensors.torch import save

    from consistency.foreign import diffusers, diffusers_config

    if description.kind != "consistency":
        raise UserError(
            f"--format diffusers: a {description.kind} model is no consistency model, which is all "
            f"that ConsistencyModelPipeline samples; {OTHERS}"
        )
    try:
        unet, scheduler, tensors = diffusers.to_diffusers(description, weights)
        library, name = "diffusers", "UNet2DModel"
    except diffusers_config.Inexpressible:
        unet, scheduler = _custom(description), diffusers_config.scheduler_config(description)
        tensors = {f"net.{key}": value.contiguous() for key, value in weights.items()}
        library, name = CODE, CLASS
    (folder / "unet").mkdir()
    (folder / "scheduler").mkdir()
    if name == CLASS:
        from pipelines.diffusers_code import one_file

        (folder / "unet" / f"{CODE}.py").write_text(one_file())
    _dump(folder / "unet" / "config.json", {"_class_name": name, **unet})
    _dump(folder / "scheduler" / "scheduler_config.json", {"_class_name": SCHEDULER, **scheduler})
    (folder / "unet" / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    about = {
        "format": 1,
        "model": json.loads(description.to_json()),
        "sampling": sampling(description),
    }
    _dump(folder / "cmforge.json", about)
    (folder / "README.md").write_text(_readme(description, custom=name == CLASS))
    index = {
        "_class_name": "ConsistencyModelPipeline",
        "scheduler": ["diffusers", SCHEDULER],
        "unet": [library, name],
    }
    _dump(folder / "model_index.json", index)
    return name == CLASS


def sampling(description: "ModelDescription") -> list[Json]:
    """For each number of steps: `timesteps` of the pipeline, and the noise levels they are."""
    from consistency.foreign.diffusers_config import levels_of

    levels, rows = levels_of(description), []
    for steps in SHOWN_STEPS:
        timesteps = levels.nearest(description.sigmas(steps), description.lowest_sigma)
        if timesteps is not None:
            sigmas = [levels.sigma(index) for index in reversed(timesteps)]
            rows.append({"steps": steps, "timesteps": timesteps, "sigmas": sigmas})
    return rows


def how_to_load(folder: str, description: "ModelDescription", *, custom: bool) -> list[str]:
    """Python lines that sample from a written folder."""
    trust = ", trust_remote_code=True" if custom else ""
    label = ", class_labels=0" if description.num_classes else ""
    rows = [row for row in sampling(description) if row["steps"] == 2]
    return [
        "from diffusers import ConsistencyModelPipeline",
        f'pipe = ConsistencyModelPipeline.from_pretrained("{folder}"{trust})',
        f"image = pipe(num_inference_steps=1{label}).images[0]",
        *(
            f"image = pipe(num_inference_steps=None, timesteps={row['timesteps']}{label}).images[0]"
            for row in rows
        ),
    ]


def _custom(description: "ModelDescription") -> Json:
    """What `CmforgeUNet` is made from, beside its weights."""
    return {
        "sample_size": description.size,
        "in_channels": description.channels,
        "out_channels": description.channels,
        "num_class_embeds": description.num_classes or None,
        "description": json.loads(description.to_json()),
    }


def _dump(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _row(steps: int, timesteps: list[int], sigmas: list[float]) -> str:
    return f"| {steps} | {timesteps} | {', '.join(f'{sigma:.5g}' for sigma in sigmas)} |"


def _readme(description: "ModelDescription", *, custom: bool) -> str:
    about = description
    classes = f"{about.num_classes} classes" if about.num_classes else "unconditional"
    lines = [
        "# A few-step image generator, made by cmforge",
        "",
        f"{about.size}x{about.size} pixels, {about.channels} channel(s), {classes}.",
        "",
        "```python",
        *how_to_load(".", about, custom=custom),
        "```",
        "",
        "| steps | timesteps | noise levels |",
        "| ---: | --- | --- |",
        *(_row(**row) for row in sampling(about)),
        "",
        "`num_inference_steps` alone takes equal parts of the scheduler's grid: with two steps "
        "that is another second level than the model's own, so give `timesteps`.",
    ]
    if custom:
        lines += [
            "",
            f"UNet2DModel cannot hold this network: `unet/{CODE}.py` has its code, which diffusers "
            "runs only with `trust_remote_code=True`. The weights stay float32.",
        ]
    if about.channels != 3:
        lines += ["", "The pipeline takes `latents=` of 3 channels only: use `generator=` here."]
    return "\n".join([*lines, ""])


# --- reading ----------------------------------------------------------------------------------


def read_folder(folder: Path) -> "tuple[ModelDescription, dict[str, Tensor]]":
    """A pipeline's folder, or that of its unet alone (then with the scheduler's defaults).

    Classes are called "0", "1", ... unless the folder is ours. UserError for all that is not as it
    must be, with every key, tensor and value that is wrong.
    """
    unet, scheduler = folder, {}
    if (folder / "model_index.json").exists():
        unet = folder / "unet"
        _check_index(folder / "model_index.json")
        scheduler = _load(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    config = _load(unet / "config.json", "UNet2DModel", CLASS)
    tensors = _tensors(unet)
    with _named(folder):
        if config.get("_class_name") == CLASS:
            return _read_custom(config, scheduler, tensors)
        from consistency.foreign.diffusers import from_diffusers

        description, weights = from_diffusers(config, scheduler, tensors)
        if (folder / "cmforge.json").exists():
            ours = _ours(_load(folder / "cmforge.json").get("model"))
            _check_same(ours, config, scheduler)
            description = ours
        return description, weights


def _check_index(path: Path) -> None:
    index = _load(path)
    if index.get("_class_name") != "ConsistencyModelPipeline":
        raise UserError(
            f"{path}: {index.get('_class_name')!r} is no pipeline that we read; give a folder of "
            f"ConsistencyModelPipeline"
        )
    for part, names in (("unet", ("UNet2DModel", CLASS)), ("scheduler", (SCHEDULER,))):
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in names:
            raise UserError(f"{path}: {part} is {entry!r}; only {' or '.join(names)} can be read")


def _read_custom(
    config: Json, scheduler: Json, tensors: "Mapping[str, Tensor]"
) -> "tuple[ModelDescription, dict[str, Tensor]]":
    """A folder of ours with code of its own, which is not looked at."""
    from consistency.foreign.fit import require_fit, shapes_of

    description = _ours(config.get("description"))
    if {**_custom(description), "_class_name": CLASS} != _plain({**config, "_class_name": CLASS}):
        raise ValueError("unet/config.json contradicts its own description")
    _check_same(description, None, scheduler)
    expected = shapes_of(description)
    require_fit(tensors, {f"net.{key}": shape for key, shape in expected.items()})
    return description, {key: tensors[f"net.{key}"].float() for key in expected}


def _ours(model: Any) -> "ModelDescription":
    """Our own description, out of a file that anyone may have written. ValueError."""
    from consistency.foreign.checks import check_raw
    from consistency.published import ModelDescription

    check_raw(model)
    return ModelDescription.from_json(json.dumps(model))


def _check_same(description: "ModelDescription", unet: Json | None, scheduler: Json) -> None:
    """ValueError where our description and diffusers' files are about two models."""
    from consistency.foreign import diffusers_config as theirs

    pairs = [("scheduler", theirs.scheduler_config(description), theirs.SCHEDULER, scheduler)]
    if unet is not None:
        pairs.append(("unet", theirs.unet_config(description), theirs.UNET, unet))
    for part, own, defaults, found in pairs:
        given = {**defaults, **{k: v for k, v in found.items() if not k.startswith("_")}}
        differ = sorted(key for key in given if given[key] != own.get(key))
        if differ and found:
            raise ValueError(
                f"{part} {', '.join(differ)}: not what cmforge wrote; delete cmforge.json to go by "
                f"diffusers' files alone"
            )


def _plain(config: Json) -> Json:
    """Without the notes that diffusers adds when it saves."""
    notes = [key for key in config if key.startswith("_") and key != "_class_name"]
    return {key: value for key, value in config.items() if key not in notes}


def _tensors(folder: Path) -> "dict[str, Tensor]":
    """The weights of a component, from one file or several."""
    from safetensors.torch import load_file

    index = folder / f"{WEIGHTS}.index.json"
    files = {path.name for path in folder.glob("*.safetensors")}
    if index.is_file():
        placed = _load(index, largest=MAX_INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(f, str) for f in placed.values()):
            raise UserError(f"{index}: no weight_map of tensors to files")
        wanted = sorted(set(placed.values()))
        outside = [name for name in wanted if name not in files]
        if outside:
            raise UserError(f"{index}: {', '.join(map(repr, outside))} is no file of this folder")
    elif WEIGHTS in files or len(files) == 1:
        wanted, placed = [WEIGHTS if WEIGHTS in files else min(files)], None
    else:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl"))
        if pickles:
            raise UserError(
                f"{folder / pickles[0]}: pickled weights are not opened; convert it with diffusers "
                f"save_pretrained(safe_serialization=True)"
            )
        raise UserError(f"{folder}: no {WEIGHTS}; give a folder that diffusers saved")
    tensors: dict[str, Tensor] = {}
    for name in wanted:
        with _named(folder / name):
            for key, value in load_file(folder / name).items():
                if placed is not None and placed.get(key) != name:
                    raise ValueError(f"{key} is not listed for this file in {index.name}")
                tensors[key] = value
    if placed is not None and (lost := sorted(set(placed) - set(tensors))):
        raise UserError(f"{index}: {', '.join(lost)}: in none of the files")
    return tensors


def _load(path: Path, *classes: str, largest: int = MAX_JSON) -> Json:
    """A JSON object of bounded size, of one of the named classes of diffusers if any is named."""
    if not path.is_file():
        raise UserError(f"{path} is not there; give a folder that diffusers saved")
    if path.stat().st_size > largest:
        raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a configuration")
    with _named(path):
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    if classes and value.get("_class_name", classes[0]) not in classes:
        raise UserError(
            f"{path}: {value['_class_name']!r}; only {' or '.join(classes)} can be read"
        )
    return value


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """JSON and safetensors each have their own exceptions for damage: one line with the place."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, RecursionError, OSError, SafetensorError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
