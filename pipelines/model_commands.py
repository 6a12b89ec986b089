"""What the commands about one model do: heavy imports wait until they are needed."""

import argparse
from pathlib import Path

from pipelines.arguments import load, tracking_uri


def sample(arguments: argparse.Namespace) -> int:
    from pipelines import sample

    arguments.recipe, arguments.overrides = None, []
    _, cluster = load(arguments, recipe_needed=False)
    path = sample.draw(
        arguments.model,
        cluster.workspace,
        tracking_uri(cluster) if (arguments.model or "").startswith("models:") else None,
        num=arguments.num,
        steps=arguments.steps,
        seed=arguments.seed,
        label=arguments.label,
        levels=None if arguments.levels is None else sample.levels_of(arguments.levels),
        guidance=arguments.guidance,
        out=Path(arguments.out),
    )
    print(path)
    return 0


def import_model(arguments: argparse.Namespace) -> int:
    from pipelines import importing

    named = arguments.classes
    imported = importing.read(
        arguments.source,
        kind=arguments.kind,
        size=arguments.size,
        head_channels=arguments.head_channels,
        classes=None if named is None else importing.class_names(named),
    )
    for line in importing.summary(imported):
        print(line)
    print(importing.write(imported, arguments.out))
    return 0


def edit(arguments: argparse.Namespace) -> int:
    from pipelines import edit

    arguments.recipe, arguments.overrides = None, []
    _, cluster = load(arguments, recipe_needed=False)
    for path in edit.run(arguments, cluster.workspace, tracking_uri(cluster)):
        print(path)
    return 0


def export(arguments: argparse.Namespace) -> int:
    from pipelines import export

    cluster = load(arguments, recipe_needed=False)[1]
    lines = export.export(
        arguments.model,
        cluster.workspace,
        tracking_uri(cluster),
        format=arguments.format,
        out=arguments.out,
    )
    print(arguments.out, *lines, sep="\n")
    return 0
