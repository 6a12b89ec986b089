"""What a training step minimises, as frozen values: `objective(nets, batch, progress, random)`.

`DenoisingObjective` trains the teacher. `ConsistencyObjective` is one composition of parts
(pairs x path x distance x weight x target); CD, CT, iCT and ECT are settings of it.
"""

from consistency.objectives.base import LossTerms, Nets, Objective, Progress
from consistency.objectives.consistency import ConsistencyObjective
from consistency.objectives.denoising import DenoisingObjective

__all__ = [
    "ConsistencyObjective",
    "DenoisingObjective",
    "LossTerms",
    "Nets",
    "Objective",
    "Progress",
]
