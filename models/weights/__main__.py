"""`python -m models.weights CHECKPOINT`: say what a checkpoint is and load it into a model, for a trial."""

import argparse
import sys
from collections.abc import Iterator

from models.registry import create_model
from models.weights.errors import CheckpointError
from models.weights.file import MODEL_KEYS, read_spec
from models.weights.hf_config import read_hints
from models.weights.identify import likely_models
from models.weights.pretrained import load_pretrained
from models.weights.rebuild import build_from_spec


def main() -> None:
    """Say what a checkpoint is and load it into a model, for a trial."""
    parser = argparse.ArgumentParser(description="Say what a checkpoint is; exit with an error if it does not load.")
    parser.add_argument("checkpoint", help="path of a file or of a folder of Hugging Face, or URL")
    parser.add_argument("--model", help="registered model to load it into (default: the one it seems to be for)")
    parser.add_argument("--model_key", default=MODEL_KEYS, help=f"where the weights are (default: {MODEL_KEYS})")
    parser.add_argument("--model_prefix", default="", help="read only the keys under this prefix")
    parser.add_argument("--table_grid", help="slots x rows x columns of its position table, e.g. 8x14x14")
    args = parser.parse_args()
    where = {"model_key": args.model_key, "model_prefix": args.model_prefix}
    try:
        spec, hints = read_spec(args.checkpoint), {}
        if spec and args.model in (None, spec["model"]):
            names, model = [spec["model"]], build_from_spec(spec)
        else:
            names, decoder_depth = likely_models(args.checkpoint, **where)
            name = args.model or names[0]
            options = hints = read_hints(args.checkpoint)
            if name.startswith("pretrain_"):
                options = {**hints, "decoder_depth": decoder_depth or None}
            else:
                options = {key: value for key, value in hints.items() if key != "normalize_target"}
            model = create_model(name, **options)
        report = load_pretrained(model, args.checkpoint, **where, table_grid=args.table_grid)
    except (CheckpointError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(report)
    print(f"  model    {args.model or ' or '.join(names)}")
    for line in _lines(spec or {}):
        print(f"  spec     {line}")
    for line in _lines(hints):
        print(f"  config   {line}")


def _lines(values: dict) -> Iterator[str]:
    """Yield "key value" of each value, those of a dictionary behind its key."""
    for key, value in values.items():
        yield from (f"{key} {line}" for line in _lines(value)) if isinstance(value, dict) else (f"{key} {value}",)


if __name__ == "__main__":
    main()
