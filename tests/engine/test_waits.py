"""Between two reports no step waits for the device: the real loop, models and objectives, and a GPU that is played.

Its tensors are PyTorch's "meta" ones: they have a shape and no content. Those on the CPU are real. What makes the host
wait for a GPU raises HostWait: results that are read, shapes that depend on them, copies that are not asynchronous.
"""

import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import session
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.augment.device import DeviceAugment
from datasets.augment.randaugment import DRIVING_OPS, NO_OP
from engine.averages import Averages, WeightAverage
from engine.checkpoint import Progress
from engine.dapt import DaptObjective
from engine.finetune import FinetuneObjective
from engine.guard import NonFinite
from engine.loop import Reporting, train_one_epoch
from engine.losses import LOSSES
from engine.optim import FUSED, Optimization, build_optimizer, parameter_groups
from models import create_model

GPU = torch.device("meta")
NEEDS_RESULTS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
aten = torch.ops.aten


class HostWait(Exception):
    """The host would wait here for the device."""


class PlayedDevice(TorchDispatchMode):
    """Raises HostWait where a GPU would make the host wait; while it does not watch, what is read is 0."""

    def __init__(self):
        super().__init__()
        self.watched, self.answers = False, 0

    @contextmanager
    def watching(self, watched):
        before, self.watched = self.watched, watched
        try:
            yield
        finally:
            self.watched = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if GPU not in [getattr(x, "device", x) for x in leaves if isinstance(x, (torch.Tensor, torch.device))]:
            return func(*args, **kwargs)  # of the host alone
        if self.watched and waits(func, args, kwargs):
            raise HostWait(func)
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            self.answers += args[0].numel()
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        if func.overloadpacket in (aten._fused_adam_, aten._fused_adamw_, aten._fused_sgd_):
            return None  # works in place; not every torch has it for such tensors
        return func(*args, **kwargs)


def waits(func, args, kwargs):
    """Return whether an operation with a tensor of the GPU makes the host wait."""
    packet = func.overloadpacket
    if packet in (aten._to_copy, aten.copy_):
        devices = [kwargs.get("device"), *(x.device for x in args if isinstance(x, torch.Tensor))]
        crosses = len({device.type for device in devices if device}) > 1
        return crosses and not (kwargs.get("non_blocking") or args[2:] == (True,))
    if packet in (
        aten.index,
        aten.index_put,
        aten.index_put_,
    ):  # a mask needs its count; indices of the host are copied
        return any(i is not None and (i.dtype in (torch.bool, torch.uint8) or i.device != GPU) for i in args[1])
    return bool(NEEDS_RESULTS & set(func.tags))


@pytest.fixture
def device(monkeypatch):
    """The played GPU; what reads statistics, at reports, may wait for it."""
    played = PlayedDevice()

    def allowed(function):
        def reading(*args, **kwargs):
            with played.watching(False):
                return function(*args, **kwargs)

        return reading

    monkeypatch.setattr(Averages, "read_window", allowed(Averages.read_window))
    monkeypatch.setattr(Averages, "read_total", allowed(Averages.read_total))
    monkeypatch.setattr(NonFinite, "read", allowed(NonFinite.read))

    def synchronize(*_):
        raise HostWait("synchronize")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no such device
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    with played:
        yield played


def finetuning(loss="crossentropy"):
    model = create_model("vit_tiny_patch16_64", drop_path_rate=0.2).to(GPU)
    batch = {
        "video": torch.zeros(2, 3, 4, 64, 64, dtype=torch.uint8, device=GPU),
        "boxes": None,
        "seed": None,
        "label": torch.tensor([0, 1]),
        "soft_label": torch.tensor([0.0, 0.9]),
        "ttc": torch.tensor([0.0, float("nan")]),
        "weight": 1.0,
        "samples": ["a", "b"],
    }
    return model, batch, FinetuneObjective(LOSSES[loss], lambda video, boxes, seeds: model.normalize(video))


def dapt():
    model = create_model("pretrain_videomae_tiny_patch16_64").to(GPU)
    mask = (torch.arange(32) % 4 > 0).expand(2, 32)
    batch = {"video": torch.zeros(2, 3, 4, 64, 64, dtype=torch.uint8, device=GPU), "mask": mask, "weight": 1.0}
    return model, batch, DaptObjective(model)


def train(device, model, batch, objective, *, opt="adamw", fault=None, average=False, **options):
    """Train five steps, reports after the second, the fourth and the last; returns how often a number was read."""

    def faulty(model, batch):
        loss, statistics = objective(model, batch)
        fault(loss, batch)
        return loss, statistics

    groups = parameter_groups(model, weight_decay=0.05)
    optimizer = build_optimizer(groups, name=opt, lr=0.1, eps=1e-8, betas=(0.9, 0.999))
    if average:
        options["ema"] = WeightAverage(model, 0.9)
    optimization = Optimization(optimizer, lambda step: 0.1, lambda step: 0.05, **options)
    run = session(optimization, Progress(steps_per_epoch=5))
    batches = [batch] * 5 * optimization.accumulate
    device.answers = 0
    with device.watching(True):
        train_one_epoch(model, batches, faulty if fault else objective, run, Reporting(clips_per_step=2, log_every=2))
    assert run.progress.step == 5
    return device.answers


HOST = torch.arange(3)  # on the host
OPTIONS = {
    "plain": {},
    "clipped": {"clip_grad": 1.0},
    "averaged": {"average": True},
    "accumulated": {"accumulate": 2},
    **{opt: {"opt": opt} for opt in FUSED if opt != "adamw"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("build", [finetuning, dapt])
def test_a_step_between_reports_waits_for_nothing(device, build, options):
    assert train(device, *build(), **OPTIONS[options]) >= 5  # the reports did read the steps


@pytest.mark.parametrize("operation", DRIVING_OPS)
def test_no_augmentation_waits(device, operation):
    """Of a clip that is a part of its memory, and cropped; what is drawn is on the host."""
    draws = {"side": [48] * 2, "ops": [[DRIVING_OPS.index(operation), NO_OP]] * 2, "levels": [[0.3, 0.0]] * 2}
    draws["crop"] = [[1, 2, 40, 44], [0, 0, 48, 48]]
    video = torch.zeros(2, 4, 64, 64, 3, dtype=torch.uint8, device=GPU)
    batch = {name: torch.tensor(values) for name, values in draws.items()}
    with device.watching(True):
        result = DeviceAugment(32)(video, batch)
    assert result.shape == (2, 3, 4, 32, 32) and result.device == GPU


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_waits(device, loss):
    train(device, *finetuning(loss))


def branch(loss, batch):
    if loss > 0:
        pass


def assign(loss, batch):
    x = torch.zeros(3, device=GPU)
    x[x > 0] = torch.ones(1, device=GPU).expand(2)


FAULTS = {
    "item": lambda loss, batch: loss.item(),
    "branch": branch,
    "float": lambda loss, batch: float(loss.detach()),
    "list": lambda loss, batch: loss[None].tolist(),
    "cpu": lambda loss, batch: loss.cpu(),
    "numpy": lambda loss, batch: loss.detach().cpu().numpy(),
    "mask": lambda loss, batch: loss[None][loss[None] > 0],
    "mask of the host": lambda loss, batch: loss[None][torch.tensor([True])],
    "index of the host": lambda loss, batch: loss[None][torch.tensor([0])],
    "assignment": assign,
    "nonzero": lambda loss, batch: loss.nonzero(),
    "masked_select": lambda loss, batch: loss.masked_select(loss > 0),
    "unique": lambda loss, batch: loss[None].unique(),
    "equal": lambda loss, batch: torch.equal(loss, loss),
    "blocking copy": lambda loss, batch: HOST.to(GPU),
    "synchronize": lambda loss, batch: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("build", [finetuning, dapt])
def test_a_wait_in_an_objective_is_noticed(device, build, fault):
    with pytest.raises(HostWait):
        train(device, *build(), fault=FAULTS[fault])


def test_a_mask_on_the_device_is_noticed(device):
    model, batch, objective = dapt()
    with pytest.raises(HostWait):
        train(device, model, batch | {"mask": batch["mask"].to(GPU)}, objective)


def test_an_optimizer_that_cannot_leave_out_a_step_by_itself_is_noticed(device):
    with pytest.raises(HostWait):
        train(device, *finetuning(), opt="lion")


HARMLESS = {
    "mask on the host": lambda loss, batch: HOST[HOST > 0],
    "number on the host": lambda loss, batch: HOST.sum().item(),
    "asynchronous copy": lambda loss, batch: HOST.to(GPU, non_blocking=True),
    "where": lambda loss, batch: torch.where(loss > 0, loss, 0.0),
    "masked_fill": lambda loss, batch: loss.masked_fill(loss > 0, 0.0),
}


@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_makes_no_wait_is_let_pass(device, harmless):
    train(device, *finetuning(), fault=HARMLESS[harmless])
