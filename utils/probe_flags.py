"""The flags of the linear probe of run_dapt.py. All may change when a run is resumed: they do not touch its weights."""

from typing import TYPE_CHECKING

from utils import names
from utils.cli import from_to, natural

if TYPE_CHECKING:
    from utils.flags import FlagGroup


def add_probe_flags(group: "FlagGroup") -> None:
    """Declare the flags in a group."""
    help = (
        "fit a linear probe on labelled windows before the first epoch, every N epochs, and after the last; 0: never "
        "(default: 1 with --probe_data_path, else never)"
    )
    group.free("probe_every", None, help, type=natural, metavar="N")
    group.free("probe_data_set", "DoTA", "labelled data set of the probe", choices=names.LABELLED_SETS)
    group.free("probe_data_path", None, "root folder, list file or pack of it", metavar="PATH")
    help = "split to take windows from, of which a third of the recordings is held out (default: train, of A3D all)"
    group.free("probe_split", None, help)
    help = "windows at most, half of them anomalous where there are so many"
    group.free("probe_windows", 2000, help, type=from_to(10, 100_000), metavar="N")
    group.free("eval_batch_size", 64, "windows per process and forward pass of the probe", type=from_to(1, 65536))
