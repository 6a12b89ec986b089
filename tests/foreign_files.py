"""Files as other projects write them: their classes' names, random weights, none of their code.

EDM's networks pickle as a call of `torch_utils.persistence._reconstruct_persistent_obj` with a
module's source and state. Stand-ins under those names, in `sys.modules` for as long as it takes,
make pickle write exactly that.
"""

import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = "import pathlib\npathlib.Path('executed').touch()\n"  # what must never be run


class Persistent(nn.Module):
    """A module that pickles as EDM's do."""

    def __reduce__(self) -> Any:
        meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": type(self).__name__,
            "state": self.__dict__,
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def persistent(name: str, *args: Any, **kwargs: Any) -> Any:
    module = type(name, (Persistent,), {})()
    module._init_args, module._init_kwargs = args, kwargs
    return module


def network(
    state: Mapping[str, Tensor], config: Mapping[str, Any], wrapper: str = "EDMPrecond", **more: Any
) -> Any:
    """What `pickle.dump` is given: a preconditioner whose `model` holds these tensors."""
    arguments = {k: v for k, v in config.items() if k not in ("model_type", "img_channels")}
    channels = config["img_channels"]
    whole = persistent(
        wrapper, arguments.pop("img_resolution"), channels, model_type=config["model_type"], **more
    )
    whole.model = persistent(
        config["model_type"],
        config["img_resolution"],
        in_channels=channels,
        out_channels=channels,
        **{k: v for k, v in arguments.items() if k != "img_resolution"},
    )
    whole.sigma_max = float("inf")
    for key, tensor in state.items():
        *path, leaf = key.split(".")
        place: nn.Module = whole
        for part in path:
            children = place if isinstance(place, nn.ModuleDict) else place._modules
            if part not in children:
                made = (
                    nn.ModuleDict() if part in ("enc", "dec") else persistent("Layer", 1, bias=True)
                )
                children[part] = made
            place = children[part]
        if leaf in ("resample_filter", "freqs"):
            place.register_buffer(leaf, tensor)
        else:
            place.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return whole


@contextmanager
def stand_ins() -> Iterator[None]:
    """`torch_utils.persistence` and `dnnlib.util`, with nothing behind them."""

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("nothing may call this")

    class EasyDict(dict[str, Any]):
        pass

    persistence, util = ModuleType("torch_utils.persistence"), ModuleType("dnnlib.util")
    for module, named in ((persistence, _reconstruct_persistent_obj), (util, EasyDict)):
        named.__module__, named.__qualname__ = module.__name__, named.__name__
        setattr(module, named.__name__, named)
    modules = {"torch_utils.persistence": persistence, "dnnlib.util": util}
    parents = {name.split(".")[0]: ModuleType(name.split(".")[0]) for name in modules}
    before = {name: sys.modules.get(name) for name in modules | parents}
    sys.modules.update(parents | modules)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def dump(path: Path, ema: Any, protocol: int = pickle.DEFAULT_PROTOCOL, **more: Any) -> Path:
    """A network's snapshot, as EDM's training writes it."""
    with stand_ins():
        easy = sys.modules["dnnlib.util"].EasyDict(class_name="training.dataset.ImageFolderDataset")
        loss = persistent("ECMLoss", P_mean=-1.1)
        loss.weight_of = loss.get_parameter  # a bound method, as ECT's loss keeps them
        whole = {"ema": ema, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": easy, **more}
        path.write_bytes(pickle.dumps(whole, protocol))
    return path


def state_file(path: Path, state: Mapping[str, Tensor], *, zipped: bool = True) -> Path:
    torch.save(dict(state), path, _use_new_zipfile_serialization=zipped)
    return path
