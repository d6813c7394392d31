"""Checks of what an option's value may be, beyond its type; `config.py` names them beside the options."""

import math
import numbers
import os
from pathlib import Path
from typing import Any

from hfdetox.errors import UsageError


def check_samples(flag: str, value: Any) -> None:
    """Raise UsageError unless `value` is a count of images, at least 1, or a fraction above 0 and up to 1."""
    if isinstance(value, bool) or not issubclass(type(value), numbers.Real):
        raise UsageError(f"{flag} {value!r} is neither a count such as 500 nor a fraction such as 0.05")
    whole = isinstance(value, numbers.Integral)
    if whole and not value >= 1:
        raise UsageError(f"{flag} {value} leaves no images: give a count of at least 1, or a fraction such as 0.05")
    if not whole and not 0 < value <= 1:
        raise UsageError(f"{flag} {value} is not a fraction above 0 and up to 1.0; a count has no point")


def check_pixel_range(flag: str, value: str) -> tuple[float, float]:
    """Return the values of black and white that `LOW,HIGH`, or HIGH alone, names; UsageError for what is no range."""
    try:
        low, high = map(float, value.split(",") if "," in value else ("0", value))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"{flag} {value}: give the values of black and white, such as 0,4095")
    return low, high


def check_share(flag: str, value: float) -> None:
    """Raise UsageError unless `value` is a share of images, above 0 and up to 1."""
    if not 0 < value <= 1:
        raise UsageError(f"{flag} {value}: a share of the images is above 0 and at most 1")


def check_points(flag: str, value: Any) -> None:
    """Raise UsageError unless `value` is a number of points of accuracy, from 0 to 100."""
    if not (isinstance(value, int | float) and 0 <= value <= 100):
        raise UsageError(f"{flag} {value}: points of accuracy are a number from 0 to 100")


def check_rate(flag: str, value: float) -> None:
    """Raise UsageError unless `value` is a rate from 0 to 1."""
    if not 0 <= value <= 1:
        raise UsageError(f"{flag} {value}: a rate is a fraction from 0 to 1, such as 0.9")


def check_there(what: str, name: Any) -> None:
    """Raise UsageError for a path that is not there; another name may be one of the Hub."""
    path = isinstance(name, Path) or (isinstance(name, str) and name.startswith((".", "/", "~")))
    if path and not os.path.exists(name):
        raise UsageError(f"{what} {name}: no such folder")


def check_replaced(option: str, path: Path, mark: str) -> None:
    """Raise UsageError for a file that cannot be written, or is there without the `mark` of what hfdetox writes."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: no such folder")
    try:
        own = not os.path.lexists(path) or (path.is_file() and mark.encode() in path.read_bytes())
    except OSError:
        own = False  # it may not be read
    if not own:
        raise UsageError(f"{option} {path} is there, and is none that hfdetox wrote; choose another name")


def same_path(one: str | Path, other: str | Path) -> bool:
    """Return whether two paths lead to one file, which need not be there."""
    return os.path.realpath(one) == os.path.realpath(other)
