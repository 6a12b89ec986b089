"""Models of other projects as ours. (Here: our own model folders, from any store.)"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from consistency.published import ModelDescription


@dataclass(frozen=True)
class Imported:
    """A model in this project's terms."""

    description: "ModelDescription"
    weights: "dict[str, Tensor]"
    source: dict[str, Any]


def read(
    source: str,
    *,
    kind: str | None = None,
    size: int | None = None,
    head_channels: int | None = None,
    classes: int | None = None,
) -> Imported:
    """A model by its path or URL. UserError for what is none."""
    from safetensors.torch import load

    from consistency.published import ModelDescription

    try:
        text = storage.read_bytes(storage.join(source, "config.json")).decode()
        data = storage.read_bytes(storage.join(source, "weights.safetensors"))
        about = ModelDescription.from_json(text)
        return Imported(about, load(data), {"place": source})
    except Exception as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{source}: is no model that can be read: {said}") from error
