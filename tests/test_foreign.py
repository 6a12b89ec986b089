"""OpenAI's and EDM's networks as ours: the same outputs as forwards restated from their words."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from consistency import published
from consistency.config import NetworkConfig
from consistency.foreign import edm, openai
from consistency.foreign.edm import Constructed
from consistency.foreign.fit import shapes_of
from tests import foreign_forward

LAYOUTS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "assets" / "checkpoint_layouts.json").read_text()
)
SMALL = [name for name in LAYOUTS if "small" in name]
FULL = [name for name in LAYOUTS if "small" not in name]
OPENAI = [name for name in SMALL if name.startswith("openai")]
EDM = [name for name in SMALL if name.startswith("edm")]
SIGMAS = torch.tensor([0.002, 0.02, 0.5, 3.0, 20.0, 80.0])


def imported(name: str, state: dict[str, Tensor], kind: Any, **options: Any) -> Any:
    config = LAYOUTS[name]["config"]
    if name.startswith("edm"):
        return edm.from_edm(state, kind=kind, **options)
    asked = {"size": config["image_size"], "head_channels": config["num_head_channels"]}
    return openai.from_openai(state, kind=kind, **{**asked, **options})


def classes_of(name: str) -> int:
    config = LAYOUTS[name]["config"]
    return int(config.get("label_dim") or config.get("num_classes") or 0)


def reference(name: str, state: dict[str, Tensor], x: Tensor, labels: Tensor | None, kind: str):
    config, boundary = LAYOUTS[name]["config"], 0.002 if kind == "consistency" else 0.0
    if name.startswith("openai"):
        network, c_noise = foreign_forward.openai(state, config), foreign_forward.thousandfold
    else:
        network, c_noise = foreign_forward.edm(state, config), foreign_forward.quarter
        labels = None if labels is None else F.one_hot(labels, classes_of(name)).float()
    return foreign_forward.wrapped(network, x, SIGMAS, labels, c_noise=c_noise, boundary=boundary)


@pytest.mark.parametrize("kind", ["denoiser", "consistency"])
@pytest.mark.parametrize("name", SMALL)
def test_the_same_outputs_at_every_noise_level_and_class(name, kind):
    state = foreign_forward.random_state(LAYOUTS[name])
    model = published.build(*imported(name, state, kind))
    noise = torch.randn(len(SIGMAS), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    x = noise * (SIGMAS**2 + 0.25).sqrt()[:, None, None, None]
    labels = torch.tensor([3, 0, 9, 5, 5, 7]) if classes_of(name) else None
    with torch.no_grad():
        ours = model.function(x, SIGMAS, labels)
        theirs = reference(name, state, x, labels, kind)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - x).abs().max() > 0.1  # the networks are not silent
    if labels is not None:
        assert (model.function(x, SIGMAS, (labels + 1) % 10) - ours).abs().max() > 1e-3


@pytest.mark.parametrize("name", FULL)
def test_every_tensor_of_the_published_networks_has_its_place(name):
    layout = LAYOUTS[name]
    state = {key: torch.empty(shape, device="meta") for key, shape in layout["keys"]}
    options = {"size": None} if name.startswith("openai") else {}
    description, weights = imported(name, state, "denoiser", **options)
    assert {key: tuple(w.shape) for key, w in weights.items()} == shapes_of(description)
    assert sum(w.numel() for w in weights.values()) == layout["parameters"]
    config = layout["config"]
    assert description.size == config.get("image_size", config.get("img_resolution"))
    assert description.num_classes == classes_of(name)
    if "num_res_blocks" in config:
        assert description.network.num_blocks == config["num_res_blocks"]
        factors = [description.size // side for side in description.network.attention]
        assert factors == config["attention_resolutions"]
        assert list(description.network.channel_mult) == config["channel_mult"]


@pytest.mark.parametrize("name", OPENAI)
def test_back_to_openai_and_in_again_is_bit_equal(name):
    state = foreign_forward.random_state(LAYOUTS[name])
    description, weights = imported(name, state, "consistency")
    back = openai.to_openai(description, weights)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    again = imported(name, back, "consistency")
    assert again[0] == description
    assert all(torch.equal(again[1][key], weights[key]) for key in weights)


def test_what_is_not_openais_network_does_not_go_back():
    state = foreign_forward.random_state(LAYOUTS[OPENAI[0]])
    description, weights = imported(OPENAI[0], state, "denoiser")
    for network in (
        NetworkConfig(channels=32, channel_mult=(1, 2), num_blocks=1, attention=(8,)),
        replace(description.network, groups=None),
    ):
        with pytest.raises(ValueError, match="only an adm with 32 groups"):
            openai.to_openai(replace(description, network=network), weights)
    odd = replace(description.network, adagn="double_norm")
    with pytest.raises(ValueError, match="double_norm has no equal"):
        openai.to_openai(replace(description, network=odd), weights)
    with pytest.raises(ValueError, match=r"map_label\.weight \[128, 10\] is missing"):
        openai.to_openai(description, {k: w for k, w in weights.items() if k[:9] != "map_label"})


# --- what the tensors do not tell ----------------------------------------------------------------


def test_the_noise_convention_and_constants_of_openais_files():
    state = foreign_forward.random_state(LAYOUTS[OPENAI[0]])
    description, _ = imported(OPENAI[0], state, "consistency", class_names=list("abcdefghij"))
    assert description.noise.c_noise == "log_sigma_1000"
    assert (description.boundary, description.noise.sigma_data) == (0.002, 0.5)
    assert (description.noise.sigma_min, description.noise.sigma_max) == (0.002, 80.0)
    assert description.class_names == tuple("abcdefghij")
    assert imported(OPENAI[0], state, "denoiser")[0].class_names == tuple("0123456789")
    with pytest.raises(ValueError, match="classes: 2 names for a model of 10 classes"):
        imported(OPENAI[0], state, "denoiser", class_names=["a", "b"])
    with pytest.raises(ValueError, match="size: the tensors do not tell"):
        imported(OPENAI[0], state, "denoiser", size=None)
    with pytest.raises(ValueError, match="head_channels: 48 does not divide"):
        imported(OPENAI[0], state, "denoiser", head_channels=48)


def test_kinds_and_second_levels_by_the_names_of_openais_files():
    names = ["edm_cat256_ema.pt", "cd_imagenet64_l2.pt", "ct_bedroom256.pt", "net.pt"]
    kinds = ["denoiser", "consistency", "consistency", None]
    assert [openai.kind_of(name) for name in names] == kinds
    assert [openai.mid_sigma_of(name) for name in names] == [0.821, 1.382, 3.991, 0.821]


def test_half_precision_becomes_fp32():
    state = foreign_forward.random_state(LAYOUTS[OPENAI[0]])
    _, weights = imported(OPENAI[0], {k: t.half() for k, t in state.items()}, "denoiser")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert torch.equal(weights["out_conv.bias"], state["out.2.bias"].half().float())


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"), [(OPENAI[0], "out.2.bias"), (EDM[2], "model.out_conv.bias")]
)
def test_all_that_does_not_fit_is_listed_at_once(name, key):
    state = foreign_forward.random_state(LAYOUTS[name])
    short = key.removeprefix("model.")
    other = "middle_block.0.in_layers.2.bias" if name == OPENAI[0] else "dec.8x8_in0.conv0.bias"
    del state[key]
    whole = other if name == OPENAI[0] else f"model.{other}"
    state[whole] = torch.zeros(3)
    state["extra.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="tensors that do not fit") as caught:
        imported(name, state, "denoiser")
    message = str(caught.value)
    assert f"{short} [3] is missing" in message
    assert f"{other} is [3] instead of [64]" in message
    assert "extra.weight [2, 2] is unknown" in message
    assert "\n" not in message


def test_a_long_list_is_cut():
    state = foreign_forward.random_state(LAYOUTS[EDM[0]])
    state |= {f"x{i:03d}": torch.zeros(1) for i in range(100)}
    with pytest.raises(ValueError, match=r"x019 \[1\] is unknown; and 80 more$"):
        imported(EDM[0], state, "denoiser")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("broken", ["integers", "nan", "one more side"])
def test_numbers_that_are_no_weights_are_refused(name, broken):
    state = foreign_forward.random_state(LAYOUTS[name])
    key = next(
        key for key in state if key.endswith("conv1.bias") or key.endswith("out_layers.3.bias")
    )
    good = state[key]
    state[key] = {
        "integers": good.long(),
        "nan": torch.full_like(good, torch.nan),
        "one more side": good[None],
    }[broken]
    with pytest.raises(ValueError, match=f"tensors that do not fit: {key.removeprefix('model.')}"):
        imported(name, state, "denoiser")


@pytest.mark.parametrize("name", SMALL)
def test_any_one_tensor_missing_is_a_clear_error(name):
    state = foreign_forward.random_state(LAYOUTS[name])
    for key in [key for key in state if not key.endswith("resample_filter")][::9]:
        if key.endswith("label.weight") or key == "label_emb.weight":
            continue  # then it is another, unconditional network, or one that lacks a bias
        with pytest.raises(ValueError):  # noqa: PT011  of many texts; that it is one is the point
            imported(name, {k: t for k, t in state.items() if k != key}, "denoiser")


# --- constructor arguments of EDM ----------------------------------------------------------------


def built(name: str, **changes: Any) -> Constructed:
    """The network of a layout, as its class was called; positional as far as EDM's wrapper does."""
    config = {**LAYOUTS[name]["config"], **changes}
    kind = config.pop("model_type")
    config["in_channels"] = config["out_channels"] = config.pop("img_channels")
    return Constructed(kind, (), config)


def wrapper(name: str = "EDMPrecond", **arguments: Any) -> Constructed:
    return Constructed(name, (16, 3), arguments)


@pytest.mark.parametrize("name", EDM)
def test_arguments_that_agree_change_nothing(name):
    state = foreign_forward.random_state(LAYOUTS[name])
    alone = imported(name, state, "denoiser")
    known = {"dropout": 0.3, "label_dropout": 0.1, "augment_dim": 9, "channel_mult_emb": 4}
    state["model.map_augment.weight"] = torch.zeros(32, 9)
    given = imported(
        name,
        state,
        "denoiser",
        wrapper=wrapper(sigma_max=float("inf"), use_fp16=True, sigma_min=0),
        network=built(name, **known),
    )
    assert given[0] == alone[0]
    assert given[1].keys() == alone[1].keys()


def test_noise_levels_are_those_the_wrapper_supports():
    state = foreign_forward.random_state(LAYOUTS[EDM[0]])

    def described(one: Constructed, kind: Any = "denoiser") -> Any:
        return imported(EDM[0], state, kind, wrapper=one)[0]

    narrow = described(wrapper(sigma_min=0.01, sigma_max=50, sigma_data=0.4)).noise
    assert (narrow.sigma_min, narrow.sigma_max, narrow.sigma_data) == (0.01, 50.0, 0.4)
    assert edm.kind_of(wrapper("ECMPrecond")) == "consistency"
    easy = described(wrapper("ECMPrecond"), "consistency")
    assert (easy.boundary, easy.kind) == (0.003, "consistency")
    assert described(wrapper("ECMPrecond", sigma_min=0.002), "consistency").boundary == 0.002
    with pytest.raises(ValueError, match="sigma_data: 'x' is not a noise level"):
        described(wrapper(sigma_data="x"))


def test_ects_function_at_its_own_boundary():
    state = foreign_forward.random_state(LAYOUTS[EDM[1]])
    arguments = imported(EDM[1], state, "consistency", wrapper=wrapper("ECMPrecond"))
    model = published.build(*arguments)
    sigma = torch.tensor([0.003, 0.5, 80.0])
    x = torch.randn(3, 3, 16, 16) * sigma[:, None, None, None]
    with torch.no_grad():
        theirs = foreign_forward.wrapped(
            foreign_forward.edm(state, LAYOUTS[EDM[1]]["config"]),
            x,
            sigma,
            None,
            c_noise=foreign_forward.quarter,
            boundary=0.003,
        )
        assert (model.function(x, sigma) - theirs).abs().max() < 1e-5
        assert torch.equal(model.function(x, sigma)[0], x[0])


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        (EDM[0], "channel_mult_noise", 2),
        (EDM[0], "encoder_type", "residual"),
        (EDM[0], "decoder_type", "skip"),
        (EDM[0], "resample_filter", [1, 3, 3, 1]),
        (EDM[1], "encoder_type", "standard"),
        (EDM[1], "channel_mult_noise", 1),
        (EDM[0], "channel_mult_emb", 2),
        (EDM[0], "num_blocks", 3),
        (EDM[0], "out_channels", 6),
        (EDM[2], "model_channels", 64),
        (EDM[2], "img_resolution", 32),
        (EDM[2], "label_dim", 11),
        (EDM[2], "channel_mult", [1, 2, 3]),
    ],
)
def test_an_argument_our_networks_do_not_follow_is_refused_by_name(name, argument, value):
    state = foreign_forward.random_state(LAYOUTS[name])
    changed = built(name)
    changed = Constructed(changed.name, (), {**changed.kwargs, argument: value})
    with pytest.raises(ValueError, match=f"^{argument}: "):
        imported(name, state, "denoiser", network=changed)


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "Precond", "Spy"])
def test_other_wrappers_are_refused_by_name(name):
    state = foreign_forward.random_state(LAYOUTS[EDM[0]])
    with pytest.raises(ValueError, match=f"^{name}: "):
        imported(EDM[0], state, "denoiser", wrapper=Constructed(name))


def test_unknown_arguments_are_refused_by_name():
    state = foreign_forward.random_state(LAYOUTS[EDM[0]])
    with pytest.raises(ValueError, match="SongUNet: unknown arguments spy"):
        imported(EDM[0], state, "denoiser", network=built(EDM[0], spy=1))
    with pytest.raises(ValueError, match="EDMPrecond: unknown arguments spy"):
        imported(EDM[0], state, "denoiser", wrapper=wrapper(spy=1))
    with pytest.raises(ValueError, match="EDMPrecond: 9 arguments, 8 are known"):
        imported(EDM[0], state, "denoiser", wrapper=Constructed("EDMPrecond", range(9)))


def test_other_resampling_filters_are_refused():
    state = foreign_forward.random_state(LAYOUTS[EDM[0]])
    key = next(key for key in state if key.endswith("resample_filter"))
    with pytest.raises(ValueError, match=r"resample_filter: enc\.8x8_down.* is not that of"):
        imported(EDM[0], state | {key: state[key] * 2}, "denoiser")
    with pytest.raises(ValueError, match=r"resample_filter: enc\.8x8_down.* is not that of"):
        imported(EDM[0], state | {key: torch.ones(1, 1, 4, 4) / 16}, "denoiser")


def test_layouts_are_told_apart_by_their_keys():
    for name in LAYOUTS:
        keys = [key for key, _ in LAYOUTS[name]["keys"]]
        assert openai.recognises(keys) == name.startswith("openai")
        assert edm.recognises(keys) == name.startswith("edm")
        assert edm.recognises([key.removeprefix("model.") for key in keys]) == edm.recognises(keys)
        assert not edm.is_edm2(keys)
    assert edm.is_edm2(["unet.emb_noise.weight", "unet.out_gain"])
