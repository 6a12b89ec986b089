"""`cmforge estimate`: the estimate as text."""

import argparse
import math
from collections.abc import Sequence

from infra.errors import UserError
from pipelines.estimate import DEVICES, GIB, USABLE, Estimate, Stage, Work, estimate, load_recipe
from pipelines.recipe import Cluster


def show(arguments: argparse.Namespace, cluster: Cluster) -> int:
    """The command `cmforge estimate`. Raises UserError."""
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu {arguments.mfu}: a share of the peak in (0, 1], such as 0.4")
    rest = [text for text in arguments.overrides if not text.startswith("cluster.")]
    found = estimate(
        load_recipe(arguments.recipe, rest),
        size=arguments.size,
        channels=arguments.channels,
        classes=arguments.classes,
    )
    print("\n".join(table(found, cluster, arguments.mfu)))
    return 0


def table(found: Estimate, cluster: Cluster, mfu: float) -> list[str]:
    """The estimate as lines of text."""
    conditional = f", {found.classes} classes" if found.classes else ""
    lines = [
        f"{found.name}: {found.size}x{found.size}x{found.channels}{conditional}, "
        f"{found.parameters / 1e6:.1f} M parameters, forward F = {found.forward / 1e9:.4g} GFLOP "
        f"per image (2 per multiply-add)"
    ]
    lines += [f"assumed: {', '.join(found.assumed)}"] if found.assumed else []
    rows = [["", "images", "steps", "batch", "FLOP", "of each image"]]
    for stage in found.stages:
        parts = " + ".join(
            f"{what} {units:g}{'' if what == 'LPIPS' else 'F'}" for what, units, _ in stage.parts
        )
        counts = [f"{stage.images:,}", f"{stage.steps:,}", f"{stage.batch:,}"]
        rows.append([stage.name, *counts, f"{_flops(stage.work):.3g}", parts])
    sampled = f"{found.evaluations:,}"
    rows.append(["samples", sampled, "", "", f"{found.sampling.flops:.3g}", "sampling F, fp32"])
    rows.append(["total", "", "", "", f"{_flops(found.work):.3g}", ""])
    lines += ["", *_columns(rows, left=(0, 5))]

    lines += ["", f"GPU time at {100 * mfu:g} % of the dense peak (assumed; --mfu)"]
    hours = [["", *(device.name for device in DEVICES)]]
    work = {stage.name: stage.work for stage in found.stages} | {"samples": [found.sampling]}
    for name, pieces in [*work.items(), ("total", found.work)]:
        hours.append([name, *(in_hours(device.hours(pieces, mfu)) for device in DEVICES)])
    lines += _columns(hours)
    if any(in_hours(math.inf) in row for row in hours):
        lines.append("-: this device has no bf16; precision=fp16 has")

    share = f"{cluster.workers} GPU{'s' if cluster.workers > 1 else ''}"
    lines += [
        "",
        f"memory per GPU, and the largest micro-batch that fits in {100 * USABLE:g} % of it",
    ]
    rows = [["", "resident", "per image", *(f"{d.name} {d.gib} GiB" for d in DEVICES)]]
    for stage in found.stages:
        fits = [stage.largest_micro_batch(device) for device in DEVICES]
        sizes = [f"{stage.resident / GIB:.2f} GiB", f"{stage.saved / 2**20:.1f} MiB"]
        rows.append([stage.name, *sizes, *(_fits(fit, stage, cluster) for fit in fits)])
    lines += _columns(rows)
    lines.append(f"all: the whole share of each of {share} (cluster.workers) at once")
    for stage in found.stages if cluster.micro_batch else ():
        micro = min(cluster.micro_batch or 0, _share(stage, cluster))
        at = stage.bytes_at(micro) / GIB
        lines.append(f"{stage.name} at micro-batch {micro}: {at:.2f} GiB (cluster.micro_batch)")
    return lines


def _flops(work: Sequence[Work]) -> float:
    return sum(part.flops for part in work)


def _share(stage: Stage, cluster: Cluster) -> int:
    return math.ceil(stage.batch / cluster.workers)


def _fits(fit: int, stage: Stage, cluster: Cluster) -> str:
    if fit == 0:
        return "none"
    return "all" if fit >= _share(stage, cluster) else str(fit)


def in_hours(hours: float) -> str:
    if math.isinf(hours):
        return "-"
    if hours >= 1:
        return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.2g} s"


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
