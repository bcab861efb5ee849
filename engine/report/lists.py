"""Which clips a figure is of: a hash of the list, its name where it is known, the clips that two files share."""

import hashlib
from collections.abc import Iterable
from typing import Any

KNOWN = {  # SHA-256 of the sorted names, as `clip_hash` makes it: name
    "47021946f8bfa705aecce3a24ef7de067aa7cc6fc71e01706462dd710ccc6f00": "DoTA val",
    "d717c0558cb2d7ebfa457a8ca3a5ecbdc0d8c43c33dc1cbc4f17761bf3a75725": "DoTA train",
    "40b152d92d3122032ab15b0df66bcfecba3a7b26b952ed540b846c2bd2ffada3": "DoTA all",
    "dc915578018f3ea3bc71668a4a75e311ca5cd3d379c768d6652835fe77b06d96": "DoTA val with consensus labels",
    "1f1aa2bdd3161b52ecef008097b990174e2fb40822d64c218ed2134d415905e5": "DoTA val with consensus labels, ego",
}


def clip_hash(names: Iterable[str]) -> str:
    """Return the SHA-256, in hexadecimal, of the sorted names of clips with newlines between them."""
    return hashlib.sha256("\n".join(sorted(names)).encode("utf-8", "surrogateescape")).hexdigest()


def clip_list(scored: Iterable[str], listed: Iterable[str] | None = None) -> dict[str, Any]:
    """Return clips, sha256 and name of the list of scored clips, for metrics.json and a report.

    listed: the clips of the split, where it is known: name is "DoTA val, 1402 clips", "1250 of the 1402 clips of DoTA
    val", or "a list of 17 clips". sha256 is of the scored ones.
    """
    scored = set(scored)
    known = KNOWN.get(sha256 := clip_hash(scored))
    whole = KNOWN.get(clip_hash(listed := set(listed))) if listed is not None else None
    if known:
        name = f"{known}, {len(scored)} clips"
    elif whole:
        name = f"{len(scored)} of the {len(listed)} clips of {whole}"
    else:
        name = f"a list of {len(scored)} clips"
    return {"clips": len(scored), "sha256": sha256, "name": name}
