"""Exported programs (.pt2 of torch.export) of others, read without running what they hold.

torch's own reader (2.13) unpickles whatever such a file carries, evaluates its symbolic sizes as
Python, and calls any function of torch that it names. So the file is gone through first, and only
what is known to be harmless is let by: raw tensors, sizes made of integers and symbols, and calls
of ATen operators. What is refused is said in one line.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

PARTS = re.compile(
    r"(models/model\.json|archive_format|archive_version|byteorder|\.data/\w+"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|data/sample_inputs/model\.pt"
    r"|data/(weights|constants)/model_\w+_config\.json)"
)
# What sizes are made of: symbols, numbers and their arithmetic.
EXPRESSIONS = {"Symbol", "Integer", "Add", "Mul", "Pow", "Mod", "Max", "Min", "FloorDiv", "CeilDiv"}
EXPRESSION_NODES = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.UnaryOp, ast.USub),
)
OPERATORS = re.compile(
    r"(torch\.ops\.aten\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|mod|getitem))"
)


def load_exported(path: Path, device: torch.device) -> tuple[nn.Module, tuple[int, ...]]:
    """The program, and the shape of the example it was exported with. ValueError when refused."""
    try:
        _examine(path)
        with path.open("rb") as file:
            program = torch.export.load(file)
        example = program.example_inputs
        if example is None or len(example[0]) != 1:
            raise ValueError("must take one argument, uint8 [B, 3, H, W]")
        if device.type != "cpu":
            program = move_to_device_pass(program, device)
        return program.module(), tuple(example[0][0].shape)
    except ValueError:
        raise
    except Exception as error:  # zip, JSON and torch each have their own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"not an exported program of torch.export.save: {reason}") from error


def _examine(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        for name in names:
            if not PARTS.fullmatch(name):
                raise ValueError(f"holds {name}, which is not part of a plain exported program")
        for kind in ("weights", "constants"):
            config = json.loads(archive.read(names[f"data/{kind}/model_{kind}_config.json"]))
            for key, entry in config["config"].items():
                if entry["use_pickle"] is not False:
                    raise ValueError(f"{kind} {key} is pickled, and pickles are not read")
        sample = io.BytesIO(archive.read(names["data/sample_inputs/model.pt"]))
        try:
            torch.load(sample, weights_only=True)  # so that torch need not fall back on more
        except Exception as error:
            raise ValueError("its sample inputs are more than tensors, and not read") from error
        model = json.loads(archive.read(names["models/model.json"]))
    if model["guards_code"]:
        raise ValueError("holds guards in Python, which are not run; export it without")
    for key, value in _texts(model):
        if key == "expr_str" and not _is_arithmetic(value):
            raise ValueError(f"a size is {value!r}, which is not arithmetic")
        if key == "target" and not OPERATORS.fullmatch(value):
            raise ValueError(f"calls {value}, which is no ATen operator")


def _texts(tree: Any) -> Iterator[tuple[str, str]]:
    """Every (key, text) of nested JSON."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if isinstance(value, str):
                yield key, value
            else:
                yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)


def _is_arithmetic(text: str) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except SyntaxError:
        return False
    return all(
        isinstance(node, EXPRESSION_NODES)
        and (not isinstance(node, ast.Call) or isinstance(node.func, ast.Name))
        and (
            not isinstance(node, ast.Name) or node.id in EXPRESSIONS or node.id in ("True", "False")
        )
        and (
            not isinstance(node, ast.Constant)
            or isinstance(node.value, bool | int)
            or re.fullmatch(r"\w+", str(node.value)) is not None
        )
        for node in nodes
    )
