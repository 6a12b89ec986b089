"""Noise levels of the edits: the paper's for a full budget, tuned ones for a few evaluations."""

import math
from typing import Literal, get_args

from consistency.schedules import karras_sigmas

Task = Literal["inpaint", "colorize", "superres", "stroke", "denoise", "interpolate"]
TASKS: tuple[Task, ...] = get_args(Task)
