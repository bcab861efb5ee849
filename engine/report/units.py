"""What a bootstrap of some scored frames draws: their clips, and the recordings these were cut from."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from engine.intervals import METRICS, Replicated, ScoreTable, multiplicities, replicate
from engine.report.frames import ScoredFrames


@dataclass(frozen=True)
class Units:
    """The units of one kind.

    kind: "clip" or "source".
    number: (number of clips,) number of the unit of each clip, from 0.
    replicates, seed: of the draws.
    """

    kind: str
    number: np.ndarray
    replicates: int
    seed: int

    @cached_property
    def count(self) -> int:
        """Number of units."""
        return int(self.number.max()) + 1 if len(self.number) else 0

    @cached_property
    def draws(self) -> np.ndarray:
        """The `multiplicities`."""
        return multiplicities(self.count, self.replicates, self.seed)

    def replicated(self, frames: ScoredFrames, score: np.ndarray) -> Replicated:
        """Return the replicated metrics of scores (n,) of the frames."""
        return replicate(ScoreTable.of(score, frames.label, self.number[frames.clip], self.count), self.draws)


def units_of(frames: ScoredFrames, replicates: int, seed: int) -> list[Units]:
    """Return the units of the clips: clips, and recordings where they are known. The last are the honest ones."""
    units = [Units("clip", np.arange(len(frames.names)), replicates, seed)]
    source, _ = frames.sources
    return units if source is None else [*units, Units("source", source, replicates, seed)]


def intervals(sample: Replicated, names: tuple[str, ...] = METRICS) -> dict[str, dict[str, Any]]:
    """Return {metric: interval in plain types}."""
    return {name: asdict(sample.interval(name)) for name in names}
