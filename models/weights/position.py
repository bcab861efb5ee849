"""The position table of a checkpoint, fitted to the grid of tokens of the model that takes it."""

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from models.pos_embed import Grid, likely_grid, position_table, resampled
from models.weights.entries import Entry
from models.weights.hf_config import read_hints

if TYPE_CHECKING:
    from models.weights.pretrained import Matching

_PUBLISHED = {"InternVideo2": (8, 16, 16), "ViViT of Hugging Face": (16, 14, 14), "ViViT, converted": (8, 14, 14)}
_FIXED = (8, 14, 14)  # of published weights: 16 frames of 224 pixels
_SMALLEST = 4  # rows of a frame that a table is thought to be for, where nothing says it


class PositionTable:
    """The table of a file, or the fixed one that its weights were trained with, on its way into a model.

    Args:
        matching: the file and the model; its `source` and `fitted` are changed.
        table_grid: see `load_pretrained`.

    Raises CheckpointError: a table_grid that is none or does not fit the table.
    """

    def __init__(self, matching: "Matching", table_grid: str | None):
        self.matching, self.encoder = matching, matching.encoder
        self.given = self._parse(table_grid) if table_grid else None

    def fit(self) -> None:
        """Fit the file's table to the encoder's grid; refuse it where the encoder has none, or its grid is not known.

        A table equal to the encoder's fixed one is ignored, unless it is known to be learned.
        """
        matching, table = self.matching, self.encoder.pos_embed
        entry = matching.source.get("pos_embed")
        if entry is None:
            self._fit_fixed()
        elif entry.tensor.ndim == 3 and entry.tensor.is_floating_point():
            if table is None:
                kind = self.encoder.pos_embed_kind
                raise matching.error(
                    f"{entry.key} is a position table, and the model has none (its positions are {kind})"
                )
            self._fit_stored(entry, table)

    def _fit_stored(self, entry: Entry, model_table: torch.Tensor) -> None:
        matching, table, notes = self.matching, entry.tensor.float(), []
        first = model_table.shape[1] - math.prod(self.encoder.grid)  # the class token's, if there is one
        if grid := self._grid(entry, table.shape[1] - first):
            table = torch.cat([table[:, :first], resampled(table[0, first:], grid, self.encoder.grid)[None]], dim=1)
            notes.append(f"{entry.key} of {_text(grid)} tokens{self._resampled(grid)}")
        if not isinstance(model_table, nn.Parameter):
            ours = table.shape == model_table.shape and torch.allclose(table, model_table, atol=1e-3)
            if not matching.is_ours and ours:
                matching.ignore("pos_embed", "position table, the model's own")
                return
            what = "replaces the model's fixed table, and is trained unless --freeze_layers is given"
            notes.append(f"{entry.key} {what}")
        matching.source["pos_embed"] = replace(entry, tensor=table)
        matching.fitted += notes

    def _fit_fixed(self) -> None:
        """Note which fixed table the model has, where the weights were trained with another; resample that if asked."""
        matching, encoder = self.matching, self.encoder
        if encoder.pos_embed is None or isinstance(encoder.pos_embed, nn.Parameter):
            return
        kind, grid = encoder.pos_embed_kind, self.given or self._grid_of_file()
        dialect = matching.dialect
        if not (matching.is_ours or dialect.pos_embed or dialect.stored_table):
            what = "the model's; the file does not say which it was trained with"
            matching.fitted.append(f"position table: {kind}, {what}")
        if self.given:
            table = resampled(position_table(kind, grid, encoder.embed_dim), grid, encoder.grid)[None]
            matching.source["pos_embed"] = Entry(f"the {kind} table", "pos_embed", table)
            matching.fitted.append(f"the {kind} table of {_text(grid)} tokens{self._resampled(grid)}, and trained")
            return
        if grid is None and not matching.is_ours and kind == dialect.pos_embed:
            grid = _FIXED
        if grid and grid != encoder.grid and kind != "umt":  # which is resampled by itself
            matching.notes.append(
                f"position table: {kind}, computed for {_text(encoder.grid)} tokens, as published; the weights "
                f"were trained with that of {_text(grid)}, which --table_grid {'x'.join(map(str, grid))} resamples"
            )

    def _resampled(self, grid: Grid) -> str:
        return f", resampled to {_text(self.encoder.grid)}" if grid != self.encoder.grid else ""

    def _grid(self, entry: Entry, positions: int) -> Grid | None:
        """Return the grid of a stored table: as given, said by the file, published, or the one that fits; else None.

        Raises CheckpointError where several fit.
        """
        if self.given:
            if math.prod(self.given) != positions:
                raise self.matching.error(
                    f"{entry.key} has {positions} positions, not {_text(self.given)}: --table_grid"
                )
            return self.given
        published = None if self.matching.is_ours else _PUBLISHED.get(self.matching.dialect.name)
        for grid in (self._grid_of_file(), self.encoder.grid, published):
            if grid and math.prod(grid) == positions:
                return grid
        fitting = possible_grids(positions, self.encoder.grid)
        if len(fitting) > 1:
            told = " or ".join(f"--table_grid {'x'.join(map(str, grid))}" for grid in fitting)
            raise self.matching.error(
                f"{entry.key} has {positions} positions, and nothing says for which slots, rows and columns: {told}"
            )
        return fitting[0] if fitting else None

    def _grid_of_file(self) -> Grid | None:
        """Return the grid of tokens that the weights were trained with, if the file or its config.json says so."""
        matching = self.matching
        spec = matching.checkpoint.spec or (read_hints(matching.path) if matching.found.family else {})
        if not {"num_frames", "input_size", "tubelet_size"} <= spec.keys():
            return None
        side = spec["input_size"] // matching.shapes["patch_embed.proj.weight"][-1]
        return spec["num_frames"] // spec["tubelet_size"], side, side

    def _parse(self, text: str) -> Grid:
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)):
            raise self.matching.error(f"--table_grid {text!r} is not slots x rows x columns, as in 8x14x14")
        return tuple(map(int, match.groups()))


def possible_grids(positions: int, wanted: Grid) -> list[Grid]:
    """Return the grids that a table of so many positions may be for, the likeliest first: square frames of a few rows
    and columns, or the wanted frames, in any number of slots.
    """
    found = [likely_grid(positions, wanted)]
    for side in range(math.isqrt(max(positions, 0)), _SMALLEST - 1, -1):
        if positions % (side * side) == 0 and positions >= 2 * side * side:  # of one slot, no video's
            found.append((positions // (side * side), side, side))
    _, h, w = wanted
    if positions > 0 and positions % (h * w) == 0:
        found.append((positions // (h * w), h, w))
    return list(dict.fromkeys(grid for grid in found if grid))


def _text(grid: Grid) -> str:
    return " x ".join(map(str, grid))
