"""Export a classifier, and prove it: what is written gives the logits of its weights file, or nothing is written.

    python -m models.export WEIGHTS --to onnx|torch_export|safetensors|hf [--output FILE_OR_FOLDER]

onnx            one .onnx file; needs the packages onnx, onnxscript and onnxruntime
torch_export    one .pt2 file of torch.export, for torch.export.load
safetensors     the weights alone, under their published names
hf              a folder for the package transformers, which it needs: VideoMAE of vit_* models, ViViT, V-JEPA 2; of a
                V-JEPA 2 whose head stands on the mean of the tokens the encoder alone, compared by its tokens

The file that was written is read again and run: by onnxruntime on the CPU, by PyTorch, by transformers. Its logits are
compared in float32 with those of the weights file, at batch 1, 2 and 3 or one clip at a time, on random windows, and on
windows of video: those of --clips, or else moving gradients with noise in place of video. The largest difference is
printed; it must be within --tolerance, and where all logits are smaller than 1, within that share of the largest.
Where the format keeps the weights as they are, they must be the same to the bit.

The spec of the weights file stands inside the file and beside it, as FILE.spec.json (in a folder, spec.json), with the
SHA-256 of what was written. models.load and `run_predict.py --weights` take all but the folder; a file whose content
has changed is refused, and so is a folder given to --finetune or --from_ckpt.
"""

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from models.registry import classifier_of
from models.weights import hf
from models.weights.container import ONNX, PROGRAM, SUFFIXES, beside
from models.weights.file import CheckpointError
from models.weights.programs import ExportedModel, require
from models.weights.rebuild import load
from models.weights.write import INPUT, WRITERS
from utils.cli import ConfigError, Number, Parser
from utils.exits import fail
from utils.files import replaced, sync, temporary_beside

PACKAGES = {ONNX: ("onnx", "onnxscript", "onnxruntime"), hf.HF: ("transformers",)}  # beyond requirements.txt
BATCHES = (1, 2, 3)  # that are compared where the number of clips is free
TOLERANCE = 1e-4
_TENSORRT = (1, 8, 32)  # clips at least, at best and at most, of the command that is printed
Run = Callable[[Tensor], Tensor]  # (B, 3, T, H, W) normalised -> (B, K)


def main() -> None:
    """Export a classifier and prove it."""
    parser = Parser(__doc__)
    parser.add_argument("weights", help="weights file of a run, path or URL")
    parser.add_argument("--to", required=True, choices=(*SUFFIXES, hf.HF), help="what to write")
    parser.add_argument("--output", help="file, of hf a folder, to write (default: named like WEIGHTS, beside it)")
    parser.add_argument(
        "--batch", default="dynamic", choices=("dynamic", "1"), help="clips that a program takes at a time (default: "
        "%(default)s; safetensors and hf take any)"
    )  # fmt: skip
    parser.add_argument(
        "--clips", help="windows of video to compare on, as the model sees them: .npy, or .npz with one array, of "
        "uint8 RGB (n, 3, frames, height, width), not normalised"
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=Number(0, 1, above=True), default=TOLERANCE, help="largest difference of a logit (default: "
        "%(default)s)"
    )  # fmt: skip
    args = parser.parse_args()
    try:
        said = export(
            args.weights, args.to, args.output, batch=args.batch, clips=args.clips, tolerance=args.tolerance
        )  # fmt: skip
    except (CheckpointError, ConfigError) as e:
        fail(f"error: {e}")
    print(said)


def export(
    weights: str,
    to: str,
    output: str | None = None,
    *,
    batch: str = "dynamic",
    clips: str | None = None,
    tolerance: float = TOLERANCE,
) -> str:
    """Export a classifier and prove it. The arguments are those of the command.

    Returns what there is to say, in lines. Raises CheckpointError: weights that cannot be read or have no logits, a
    format that has no place for them, a missing package, a proof that failed; ConfigError: windows or an output that
    cannot be used. No file is left behind then.
    """
    model, spec = load(weights)
    if isinstance(model, ExportedModel):
        raise CheckpointError(f"{weights}: it is exported already; give the weights file that it was exported from")
    if classifier_of(spec["model"]) != spec["model"] or not spec["classes"]:
        raise CheckpointError(f"{weights}: {spec['model']} has no logits to export; fine-tune it first: "
                              f"run_finetune.py --finetune {weights}")  # fmt: skip
    kind = hf.kind_of(model, weights) if to == hf.HF else None
    for package in PACKAGES.get(to, ()):
        require(package)
    target = Path(output) if output else _default_output(weights, to)
    if target.resolve() == Path(weights).resolve():
        raise ConfigError(f"{target}: this is the file to export; give another --output")
    windows = {"random": random_windows(spec)}
    windows |= {"of video": read_windows(clips, spec)} if clips else {"video-like": moving_windows(spec)}
    batch = batch if to in (ONNX, PROGRAM) else "dynamic"
    run = hf.Features(model) if kind is hf.VJEPA2_ENCODER else model
    proof = Proof(run, windows, BATCHES if batch == "dynamic" else (1,), tolerance)
    if kind:
        lines = _write_folder(target, model, spec, kind, proof)
    else:
        lines = _write_file(target, to, model, spec, proof, batch)
    return "\n".join([f"{spec['model']} from {weights}", *lines])


def _default_output(weights: str, to: str) -> Path:
    """Return WEIGHTS with another suffix; of a URL, in the current folder."""
    is_url = weights.startswith(("http://", "https://"))
    path = Path(weights.partition("?")[0].rpartition("/")[2] if is_url else weights)
    return path.with_name(f"{path.stem}-hf") if to == hf.HF else path.with_suffix(SUFFIXES[to])


def _write_file(target: Path, to: str, model: nn.Module, spec: dict, proof: "Proof", batch: str) -> list[str]:
    """Write a file and its spec, if the proof holds. Returns what there is to say."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replaced(beside(target)) as spec_file, replaced(target) as temporary:
        record = WRITERS[to](temporary, model, spec, batch=batch, tolerance=proof.tolerance)
        spec_file.write_text(record)
        written, _ = load(str(temporary))
        proof.compare_weights(written)
        result = proof.compare(written.eval())
    lines = [f"  to {to}: {target} ({target.stat().st_size / 1e6:.1f} MB), its spec in {beside(target)}", result]
    return [*lines, *(tensorrt_lines(target, spec, batch) if to == ONNX else [])]


def _write_folder(target: Path, model: nn.Module, spec: dict, kind: hf.Kind, proof: "Proof") -> list[str]:
    """Write a folder for transformers, if the proof holds, with the names of biases that this version reads."""
    failures = []
    for biases in kind.biases:
        try:
            with _new_folder(target) as temporary:
                hf.write_hf(temporary, model, spec, kind=kind, biases=biases, tolerance=proof.tolerance)
                written = hf.HfModel(temporary, kind)
                result = proof.compare(written)
        except ProofError as e:
            failures.append(f"with {biases}: {e}" if biases else str(e))
            continue
        version = f"transformers {written.transformers.__version__}"
        named = f"biases named {biases}, as {version} reads them" if biases else f"read by {version}"
        return [f"  to hf: {target}, for {kind.name}, {named}", result, *hf.lines_on(kind)]
    raise ProofError("; ".join(failures))


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target`, new or empty till then; after an exception nothing is left.

    Raises ConfigError where something is there, OSError, which names it, where it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists already; give another --output, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        os.replace(temporary, target)
    except OSError as e:
        if e.errno is None or e.filename is not None:
            raise
        raise OSError(e.errno, e.strerror, str(target)) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class ProofError(CheckpointError):
    """What was written does not do what the weights file does; the message says by how much."""


class Proof:
    """The logits of a model on some windows, and the comparison of another's with them.

    Args:
        model: of the weights file, in evaluation mode.
        windows: {what they are: (n, 3, T, H, W) uint8}.
        batches: how many clips are run at a time.
        tolerance: the largest difference of a logit.
    """

    def __init__(self, model: nn.Module, windows: dict[str, Tensor], batches: tuple[int, ...], tolerance: float):
        self.model, self.batches, self.tolerance = model, batches, tolerance
        self.windows = {what: model.normalize(video) for what, video in windows.items()}
        self.expected = {what: _in_batches(model, video, max(batches)) for what, video in self.windows.items()}

    def compare(self, run: Run) -> str:
        """Compare another model's logits; returns what was found, in a line.

        Raises ProofError where they differ, or all of the weights file's are 0.
        """
        largest = max(logits.abs().max().item() for logits in self.expected.values())
        if largest == 0:
            raise ProofError("all logits of the weights file are 0, so that a comparison says nothing: its head is not "
                             "trained")  # fmt: skip
        limit = self.tolerance * min(1, largest)  # smaller logits agree to any tolerance, whatever the weights
        differences = {what: self._difference(run, what) for what in self.windows}
        found = ", ".join(f"{value:.2g} on {len(self.windows[kind])} windows {kind}"
                          for kind, value in differences.items())  # fmt: skip
        what = "feature" if isinstance(self.model, hf.Features) else "logit"
        result = f"largest difference of a {what} {found}, at batch {', '.join(map(str, self.batches))}"
        scale = f"{what}s up to {largest:.3g}, limit {limit:.3g}"
        if not max(differences.values()) <= limit:
            raise ProofError(
                f"nothing was written: what was made does not do what the weights file does: {result} ({scale})"
            )
        return f"  {result} ({scale})"

    def _difference(self, run: Run, what: str) -> float:
        """Return the largest difference on some windows, infinite where logits are not finite or of another shape."""
        video, expected = self.windows[what], self.expected[what]
        worst = 0.0
        for size in self.batches:
            few = video if size == max(self.batches) else video[:size]
            found, wanted = _in_batches(run, few, size), expected[: len(few)]
            if found.shape != wanted.shape or not found.isfinite().all():
                return float("inf")
            worst = max(worst, (found - wanted).abs().max().item())
        return worst

    def compare_weights(self, written: nn.Module) -> None:
        """Raise ProofError where what was written keeps the weights by name, and one is not the same to the bit."""
        weights = written.weights() if isinstance(written, ExportedModel) else _tensors(written)
        for name, tensor in _tensors(self.model).items() if weights is not None else ():
            if name not in weights or not torch.equal(weights[name], tensor):
                raise ProofError(f"nothing was written: {name} is not as in the weights file in what was made")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def _in_batches(run: Run, video: Tensor, size: int) -> Tensor:
    return torch.cat([run(part).float() for part in video.split(size)])


def random_windows(spec: dict, count: int = max(BATCHES)) -> Tensor:
    """Return (count, 3, T, H, W) uint8: noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *_shape(spec)), dtype=torch.uint8, generator=generator)


def moving_windows(spec: dict, count: int = max(BATCHES)) -> Tensor:
    """Return (count, 3, T, H, W) uint8: colours that change slowly over the picture and move, with a little noise."""
    generator = torch.Generator().manual_seed(1)
    channels, frames, height, width = _shape(spec)
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    waves, speeds, starts = (torch.rand(3, count, channels, 1, 1, 1, generator=generator) * 2 - 1).unbind()
    angle = 2 * torch.pi * (2 * waves * x + 3 * starts * y + speeds * t + starts)
    noise = torch.randn(count, channels, frames, height, width, generator=generator)
    return (127 + 90 * angle.sin() + 6 * noise).round().clamp(0, 255).byte()


def read_windows(path: str, spec: dict) -> Tensor:
    """Return the windows of a file, (n, 3, T, H, W) uint8, repeated where they are few.

    Raises ConfigError where it cannot be read, or holds others than the model of the spec takes.
    """
    wanted = f"--clips needs an array of uint8 of shape (n, {', '.join(map(str, _shape(spec)))}), by numpy.save"
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):
            names = content.files
            content = content[names[0]] if len(names) == 1 else None
    except (OSError, ValueError, EOFError, BadZipFile) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else "not a file of NumPy"
        raise ConfigError(f"{path}: {reason}; {wanted}") from e
    if content is None:
        raise ConfigError(f"{path}: holds {len(names)} arrays; {wanted}")
    if content.dtype != np.uint8 or content.shape[1:] != _shape(spec) or not len(content):
        raise ConfigError(f"{path}: holds {content.dtype} of shape {content.shape}; {wanted}")
    return torch.from_numpy(np.resize(content, (max(len(content), max(BATCHES)), *content.shape[1:])))


def _shape(spec: dict) -> tuple[int, int, int, int]:
    return 3, spec["num_frames"], spec["input_size"], spec["input_size"]


def tensorrt_lines(path: Path, spec: dict, batch: str) -> list[str]:
    """Say how TensorRT builds an engine of an ONNX file; none of it is run here."""
    shape, name = "x".join(map(str, _shape(spec))), shlex.quote(str(path))
    engine = shlex.quote(str(path.with_suffix(".engine")))
    start = f"trtexec --onnx={name} --saveEngine={engine}"
    lines = ["  TensorRT, not tested here; its numbers are its own, so compare them with those of the weights file:"]
    if batch == "1":
        return [*lines, f"    {start}"]

    def profile(*sizes: int) -> str:
        return " ".join(f"--{k}Shapes={INPUT}:{n}x{shape}" for k, n in zip(("min", "opt", "max"), sizes, strict=True))

    return [*lines, f"    {start} {profile(1, 1, 1)}    # one clip", f"    {start} {profile(*_TENSORRT)}    # several"]


if __name__ == "__main__":
    main()
