"""Averages of training statistics that do not stall the device."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from utils.distributed import all_sum, world_size


class Averages:
    """Running means of scalars that stay on their device until they are asked for.

    `window` covers the updates since it was last read, `total` all of them. Both are sums, the count in the last place.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.names: list[str] = []
        self._window = self._total = torch.zeros(0, dtype=torch.float64)

    def update(self, values: Mapping[str, torch.Tensor], leave_out: torch.Tensor | None = None) -> None:
        """Add one value of each name; no synchronisation. The names are those of the first call.

        leave_out: bool () on the values' device: whether to leave these out.
        """
        row = torch.stack([value.detach().to(torch.float64) for value in self._ordered(values)])
        row = torch.cat([row, torch.ones_like(row[:1])])
        if leave_out is not None:
            row = torch.where(leave_out, 0.0, row)
        self._window = self._window.to(row.device) + row
        self._total = self._total.to(row.device) + row

    def _ordered(self, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        if not self.names:
            self.names = list(values)
            self._window = self._total = torch.zeros(len(values) + 1, dtype=torch.float64)
        return [values[name] for name in self.names]

    def read_window(self) -> dict[str, float]:
        """Return means since the last call, of this rank, NaN where there was nothing; waits for the device."""
        sums, self._window = self._window.tolist(), torch.zeros_like(self._window)
        return self._means(sums)

    def read_total(self) -> dict[str, float]:
        """Return means since the start, over all ranks; waits for the device. Empty before the first update."""
        return self._means(all_sum(self._total.clone()).tolist()) if self.names else {}

    def _means(self, sums: list[float]) -> dict[str, float]:
        return {n: value / sums[-1] if sums[-1] else math.nan for n, value in zip(self.names, sums, strict=False)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, on the CPU."""
        sums = {"window": self._window.cpu(), "total": self._total.cpu()}
        return {"names": self.names, "world_size": world_size(), **sums}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the sums of one or several ranks; from nothing if there are none.

        Each step keeps its weight where the ranks were more or fewer.
        """
        self.reset()
        for state in (state for state in states if state["names"]):
            parts = [state[name] * (world_size() / state["world_size"]) for name in ("window", "total")]
            if self.names:
                parts = [self._window + parts[0], self._total + parts[1]]
            self.names, (self._window, self._total) = list(state["names"]), parts
