"""Trivial baselines: scores that no pixel has a part in. A model is worth its distance from them. NumPy only.

A prior is the share of anomalous frames that a bin of something trivial has in the labels of a training split:

    position            where in its clip a frame stands, frame / last frame of the clip, 40 quantile bins. It needs the
                        length of the clip, which a live system does not know: it says what the cutting gives away
    frame_index         frames since the beginning of the clip, 40 quantile bins: the same for a live system
    length              frames of the clip, 40 quantile bins
    position_x_length   20 equal bins of position times 8 quantile bins of length

`clip_oracle` knows for each clip how much of it is anomalous, and nothing of when. `constant` knows nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BINS, POSITION_BINS, LENGTH_BINS = 40, 20, 8
FOLDS = 10


@dataclass(frozen=True)
class LabelTable:
    """The labels of frames of some clips, those that a window ends on.

    clip: (n,) number of the clip, from 0.
    frame: (n,) number of the frame in its clip.
    label: (n,) 0 or 1.
    last_frame: (number of clips,) of each clip; None = the last of `frame`.
    """

    clip: np.ndarray
    frame: np.ndarray
    label: np.ndarray
    last_frame: np.ndarray | None = None

    @property
    def last(self) -> np.ndarray:
        """(n,) last frame of the clip that a row is of."""
        if self.last_frame is not None:
            return np.asarray(self.last_frame)[self.clip]
        last = np.zeros(int(self.clip.max()) + 1 if len(self.clip) else 0, np.int64)
        np.maximum.at(last, self.clip, self.frame)
        return last[self.clip]

    @property
    def position(self) -> np.ndarray:
        """(n,) float64 in [0, 1]: frame / last frame; 0 in a clip of one frame."""
        return self.frame / np.maximum(self.last, 1)


def _quantile_edges(values: np.ndarray, bins: int) -> np.ndarray:
    return np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))


def _bin(edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(edges, values, "right") - 1, 0, max(len(edges) - 2, 0))


Cells = Callable[[LabelTable], np.ndarray]


def _one_dimensional(values: Callable[[LabelTable], np.ndarray], train: LabelTable) -> tuple[Cells, int]:
    edges = _quantile_edges(values(train), BINS)
    return lambda table: _bin(edges, values(table)), max(len(edges) - 1, 1)


def _position_x_length(train: LabelTable) -> tuple[Cells, int]:
    edges = _quantile_edges(train.last + 1, LENGTH_BINS)
    columns = max(len(edges) - 1, 1)

    def cells(table: LabelTable) -> np.ndarray:
        row = _bin(np.linspace(0, 1, POSITION_BINS + 1), table.position)
        return row * columns + _bin(edges, table.last + 1)

    return cells, POSITION_BINS * columns


PRIORS: dict[str, Callable[[LabelTable], tuple[Cells, int]]] = {
    "position": lambda train: _one_dimensional(lambda table: table.position, train),
    "frame_index": lambda train: _one_dimensional(lambda table: table.frame, train),
    "length": lambda train: _one_dimensional(lambda table: table.last + 1, train),
    "position_x_length": _position_x_length,
}


def _shares(positive: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the share of anomalous frames in each cell; an empty cell has that of all."""
    whole = positive.sum() / max(count.sum(), 1)
    return np.divide(positive, count, out=np.full(len(count), float(whole)), where=count > 0)


def prior(name: str, train: LabelTable, table: LabelTable) -> np.ndarray:
    """Return the scores (n,) float64 in [0, 1] of the frames of `table` by a prior, one of PRIORS, learned on `train`.

    Raises ValueError where `train` is empty.
    """
    if not len(train.label):
        raise ValueError("a prior cannot be learned from no labels")
    cells, size = PRIORS[name](train)
    count, positive = _counted(cells(train), train.label, size)
    return _shares(positive, count)[cells(table)]


def cross_fitted_prior(name: str, table: LabelTable, source: np.ndarray) -> np.ndarray:
    """Return the scores (n,) of a prior learned on the scored frames themselves, for want of a training split.

    source: (number of clips,) number of the recording of each clip, from 0. The recordings make up to FOLDS parts, and
    the frames of a part get the shares of the other parts: no frame is scored by its own label.

    Raises ValueError where there is one recording.
    """
    owner = np.asarray(source)[table.clip]
    present, owner = np.unique(owner, return_inverse=True)
    if len(present) < 2:
        raise ValueError("all clips are of one recording: nothing is left to learn a prior from")
    fold = owner % min(FOLDS, len(present))
    cells, size = PRIORS[name](table)
    cell = cells(table)
    count, positive = _counted(cell, table.label, size)
    scores = np.empty(len(cell))
    for part in range(fold.max() + 1):
        own = fold == part
        own_count, own_positive = _counted(cell[own], table.label[own], size)
        scores[own] = _shares(positive - own_positive, count - own_count)[cell[own]]
    return scores


def clip_oracle(table: LabelTable) -> np.ndarray:
    """Return the scores (n,) float64 of the frames: the share of anomalous frames of their own clip."""
    count, positive = _counted(table.clip, table.label, int(table.clip.max()) + 1)
    return _shares(positive, count)[table.clip]


def _counted(cell: np.ndarray, label: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.bincount(cell, minlength=size), np.bincount(cell, label, minlength=size)
