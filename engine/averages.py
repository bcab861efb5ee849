"""Averages of training statistics and of weights that do not stall the device."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

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
        names = self.names or list(values)
        row = torch.stack([values[name].detach().to(torch.float64) for name in names])
        row = torch.cat([row, torch.ones_like(row[:1])])
        if leave_out is not None:
            row = torch.where(leave_out, 0.0, row)
        if not self.names:
            self.names, self._window, self._total = names, torch.zeros_like(row), torch.zeros_like(row)
        self._window = self._window.to(row.device, non_blocking=True) + row
        self._total = self._total.to(row.device, non_blocking=True) + row

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


class WeightAverage:
    """The exponential moving average of a model's parameters: from the first ones on, as published.

    Args:
        model: the model as it is, not wrapped.
        decay: what is kept of the average in a step.
        on_cpu: keep it there. Weights are then copied while the device goes on, and added in the step after.
    """

    def __init__(self, model: nn.Module, decay: float, *, on_cpu: bool = False):
        self.decay, self._average = decay, copy.deepcopy(model).eval()
        self._copies: list[torch.Tensor] = []  # of the weights, where they are elsewhere
        self._copied: torch.cuda.Event | None = None
        if on_cpu and next(model.parameters()).is_cuda:
            self._average.cpu()
            self._copies = [torch.empty_like(p, pin_memory=True) for p in self._average.parameters()]

    @property
    def module(self) -> nn.Module:
        """The model with averaged weights."""
        self._add_copies()
        return self._average

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the model's present weights."""
        if not self._copies:
            self._add(list(model.parameters()))
            return
        self._add_copies()
        for copied, parameter in zip(self._copies, model.parameters(), strict=True):
            copied.copy_(parameter, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    @torch.no_grad()
    def _add_copies(self) -> None:
        if self._copied:
            self._copied.synchronize()  # of the step before: the device has the present one to do
            self._copied = None
            self._add(self._copies)

    def _add(self, weights: list[torch.Tensor]) -> None:
        torch._foreach_lerp_(list(self._average.parameters()), weights, 1 - self.decay)
