"""Small random models of every shape that is exported, no weight left at zero."""

from consistency.config import NetworkConfig, NoiseConfig
from consistency.published import ModelDescription, build, build_network
from tests.every_kind import shaken

SMALL = {"channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attention": (8,)}
NAMES = ("cat", "dog", "owl")


def described(architecture, *, kind="consistency", conditional=True, noise=None, **changes):
    """A description; `changes` of the network unless they are ModelDescription's own."""
    own = {"size": 16, "channels": 3, "class_names": NAMES}
    own |= {name: changes.pop(name) for name in list(changes) if name in ABOUT}
    network = NetworkConfig(
        architecture=architecture, class_conditional=conditional, **{**SMALL, **changes}
    )
    return ModelDescription(kind=kind, network=network, noise=noise or NoiseConfig(), **own)


ABOUT = ("size", "channels", "class_names", "boundary", "lowest_sigma", "mid_sigma")


def weights_of(description, seed=0):
    return shaken(build_network(description).state_dict(), seed)


def model_of(description, seed=0):
    return build(description, weights_of(description, seed))


# As NetworkConfig's EDM rule gives these widths groups of 8 to 32, "native" has its own.
NATIVE = {"groups": 32, "noise": NoiseConfig(c_noise="log_sigma_1000")}
EVERY = {
    "quickstart": lambda **more: described("ddpmpp", **{"size": 8, "channels": 1, **more}),
    "ddpmpp": lambda **more: described("ddpmpp", **more),
    "ncsnpp": lambda **more: described("ncsnpp", fourier_scale=0.5, **more),
    "adm": lambda **more: described("adm", **more),
    "adm-native": lambda **more: described("adm", **{**NATIVE, **more}),
    "adm-native-shift": lambda **more: described(
        "adm", **{**NATIVE, "adagn": "shift", "head_channels": 16, **more}
    ),
    "angle": lambda **more: described(
        "ddpmpp", **{"boundary": 0.0, "noise": NoiseConfig(c_noise="angle"), **more}
    ),
}
