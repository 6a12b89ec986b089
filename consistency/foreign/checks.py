"""What is asked of a foreign model before anything of its size is made."""

from collections.abc import Sequence

LARGEST = {"levels": 16, "width": 1 << 16, "num_blocks": 64, "size": 1 << 13, "channels": 64}
MOST_CLASSES = 1 << 20


def check_bounds(
    *, size: int, channels: int, classes: int, widths: Sequence[int], num_blocks: int
) -> None:
    """ValueError for a network that nobody trains, which would only fill this machine's memory."""
    found = {
        "levels": len(widths),
        "width": max(widths),
        "num_blocks": num_blocks,
        "size": size,
        "channels": channels,
    }
    beyond = [
        f"{name} {n} (at most {LARGEST[name]})" for name, n in found.items() if n > LARGEST[name]
    ]
    if classes > MOST_CLASSES:
        beyond.append(f"{classes} classes (at most {MOST_CLASSES})")
    if beyond:
        raise ValueError(f"larger than any network we know: {', '.join(beyond)}")


def check_raw(model: object) -> None:
    """`check_bounds` of a model description that is only JSON yet. ValueError."""
    try:
        network, names = model["network"], model["class_names"]  # type: ignore[index]
        mults = [network["channels"] * mult for mult in network["channel_mult"]]
        numbers = [model["size"], model["channels"], network["num_blocks"], *mults]  # type: ignore[index]
        whole = mults and all(type(number) is int for number in numbers)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError("not a cmforge model description")
    size, channels, num_blocks, *widths = numbers
    check_bounds(
        size=size, channels=channels, classes=len(names), widths=widths, num_blocks=num_blocks
    )
