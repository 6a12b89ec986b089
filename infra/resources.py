"""What a step needs, and what a cluster has."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs, of a cluster or of a step."""

    cpus: float
    gpus: float = 0.0

    def __add__(self, other: "Resources") -> "Resources":
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus)

    def within(self, other: "Resources") -> bool:
        return self.cpus <= other.cpus and self.gpus <= other.gpus
