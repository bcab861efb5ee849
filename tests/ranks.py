"""What tests/test_ranks.py runs under torchrun: cases by name; rank N writes what they return to N.json."""

import copy
import json
import shutil
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine import checkpoint, resume
from engine.checkpoint import Progress, RunState, find_last
from engine.resume import agreed_state
from models import create_model
from utils.cli import ConfigError
from utils.distributed import (
    data_parallel,
    local_main_first,
    process_group,
    require_same,
    require_same_weights,
)
from utils.record import Changeable


def steps(parallel, optimizer, numbers, rank, passes):
    """Train a model on noise that depends on (step, rank)."""
    for step in numbers:
        generator = torch.Generator().manual_seed(100 * step + rank)
        for i in range(passes):
            parallel.require_backward_grad_sync = i == passes - 1  # as no_sync does
            parallel(torch.randn(1, 3, 4, 64, 64, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def sums(process, folder):
    """Whether three steps in one go and with a stop after any of them end in the same weights and moments."""
    passes = process.world_size - 2

    def fresh():
        torch.manual_seed(0)
        model = create_model("vit_tiny_patch16_64", init_scale=1.0)
        random = torch.get_rng_state()
        parallel = data_parallel(model, process)
        assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())
        return model, parallel, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    ends = []
    for stop in (0, 1, 2):
        model, parallel, optimizer = fresh()
        steps(parallel, optimizer, range(stop), process.rank, passes)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model, parallel, optimizer = fresh()
        for part, state in zip((model, optimizer), saved, strict=True):
            part.load_state_dict(state)
        steps(parallel, optimizer, range(stop, 3), process.rank, passes)
        moments = [value for values in optimizer.state.values() for value in values.values()]
        ends.append([*model.parameters(), *moments])
    return {"equal": all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end, strict=True))}


def refusal(function, *words, **options):
    try:
        function(*words, **options)
    except ConfigError as e:
        return str(e)
    return None


def states(process, folder):
    """What ranks say that find different things in folders of their own, here/0 and here/1."""
    resume._LATE = 1.0
    here, model = folder / str(process.rank), create_model("vit_tiny_patch16_64")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def save(where, epoch):
        state = RunState(model, checkpoint.Optimization(optimizer, float, float), Progress(epoch), record={"lr": 1})
        checkpoint.gather, gather = lambda value: [value], checkpoint.gather
        checkpoint.save_last(where, state)
        checkpoint.gather = gather

    def found(where, **options):
        options = {"auto_resume": True, "resume": None, "record": {"lr": 1}, "changeable": Changeable()} | options
        dist.barrier()
        try:
            state = agreed_state(where, **options)
        except ConfigError as e:
            return str(e)
        return state and [state["epoch"], int(sum(v.double().abs().sum() for v in state["model"].values()))]

    said = {"none": found(here / "none")}
    if process.rank == 0:
        save(here / "one", 3)
    said["rank 0 alone"] = found(here / "one")
    said["rank 0 alone, --resume"] = found(here / "new", resume=str(find_last(here / "one") or here / "one"))
    if process.rank == 1:
        save(here / "other", 3)
    said["rank 1 alone"] = found(here / "other")
    if process.rank == 1:
        torch.nn.init.constant_(model.head.bias, 7)
        save(here / "one", 3)
    said["two states"] = found(here / "one")
    if process.rank == 1:
        shutil.rmtree(here / "one")
        resume._LATE = 60.0
        late = threading.Timer(1.5, shutil.copytree, (folder / "0" / "one", here / "one"))
        late.start()
    said["late"] = found(here / "one")
    said["other arguments"] = found(here / "one", record={"lr": 2})
    (here / "one" / "checkpoint-last" / "state.pth").write_bytes(b"PK")
    resume._LATE = 1.0
    said["damaged"] = found(here / "one")
    return said


def weights(process, folder):
    """Weights that differ between ranks: where they were drawn, by a rounding, by a training step, in what there is."""
    torch.manual_seed(process.rank)
    model, said = create_model("vit_tiny_patch16_64"), {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("head."):
                parameter.fill_(0.1 * (1 + 1e-7 * process.rank))
        loaded = [name for name in model.state_dict() if not name.startswith("head.")]
        said["rounding"] = refusal(require_same_weights, model, loaded, "--finetune x.pth")
        said["keys"] = refusal(require_same_weights, model, loaded[process.rank :], "--finetune x.pth")
        model.blocks[1].norm1.weight.add_(1e-5 * process.rank)
    said["step"] = refusal(require_same_weights, model, loaded, "--finetune x.pth")
    said["values"] = refusal(require_same, {"epoch": process.rank, "step": 5})
    return said


def download(process, folder):
    """The first rank takes three times as long as ranks wait for each other."""
    set_timeout = dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=1))
    with local_main_first(process):
        if process.local_rank == 0:
            time.sleep(3)
        said = {"after": (folder / "file").exists()}
        (folder / "file").touch()
    set_timeout(process.timeout)
    return said


def memory(process, folder):
    """MiB of private memory that a state on the disk takes while it is mapped, and what it has there."""

    def private():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024

    if process.rank == 0:
        model = torch.nn.Linear(4096, 2048)
        (folder / "checkpoint-last").mkdir()
        names = (*Progress.__dataclass_fields__, "optimizer", "scaler", "model_ema", "ranks", "args")
        torch.save({"model": model.state_dict()} | dict.fromkeys(names, {}), folder / "checkpoint-last" / "state.pth")
    dist.barrier()
    before = private()
    state = agreed_state(folder, auto_resume=True, resume=None, record={}, changeable=Changeable())
    total = float(state["model"]["weight"].sum())
    dist.barrier()  # what one rank alone has read so far counts as private
    said = {"MiB": private() - before, "read": total != 0}
    dist.barrier()
    return said


if __name__ == "__main__":
    where, *names = sys.argv[1:]
    with process_group("cpu", timeout=timedelta(minutes=2)) as this:
        result = {name: globals()[name](this, Path(where)) for name in names}
        Path(where, f"{this.rank}.json").write_text(json.dumps(result))
