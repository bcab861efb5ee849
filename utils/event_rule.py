"""The numbers of a rule that makes events of scores: their ranges, and the check of a stored one."""

from types import MappingProxyType

from utils.cli import Number, share

seconds = Number(0, 3600)
RANGES = MappingProxyType(
    {"threshold": share, **dict.fromkeys(("alert_after", "gap", "min_duration", "rise", "fall"), seconds)}
)
_TEXTS = ("source", "criterion")
_MEASURED = "measured"


def check_operating_point(point: object) -> None:
    """Raise ValueError, which says what is wrong, unless this is an operating point as a weights file holds it.

    That is a dictionary of plain types: "threshold" and what else it has of RANGES, "source" and "criterion", texts,
    and "measured", a dictionary of figures by name.
    """
    if not isinstance(point, dict):
        raise ValueError(f"the operating point is a {type(point).__name__}, not a dictionary")
    if "threshold" not in point:
        raise ValueError("the operating point lacks threshold")
    for name, value in point.items():
        if name in RANGES:
            if type(value) not in (int, float) or not RANGES[name].includes(value):
                raise ValueError(f"the operating point says {name} = {str(value)[:40]}, which is not {RANGES[name]}")
        elif name in _TEXTS:
            if not isinstance(value, str):
                raise ValueError(f"the operating point says {name} = {str(value)[:40]}, which is not a text")
        elif name != _MEASURED:
            raise ValueError(f"the operating point has {str(name)[:40]!r}, which this code does not know: update it")
        elif not (isinstance(value, dict) and all(_is_figure(*item) for item in value.items())):
            raise ValueError(f"the operating point says measured = {str(value)[:40]}, which are not figures by name")


def _is_figure(name: object, value: object) -> bool:
    return isinstance(name, str) and (value is None or type(value) in (int, float, str))
