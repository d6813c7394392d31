"""The options of `hfdetox scan`, declared as in `config.py`."""

from dataclasses import dataclass

from hfdetox.arguments import option
from hfdetox.checks import check_samples
from hfdetox.config import DEFAULT_SAMPLES, IMAGES, RUN, ImageOptions


@dataclass(frozen=True, kw_only=True)
class ScanOptions(ImageOptions):
    """The options of `hfdetox scan MODEL`, the arguments of `scan`."""

    COMMAND = "scan"

    clean_samples: int | float = option(
        DEFAULT_SAMPLES, IMAGES, "Clean images that scores look at: a fraction with a point, or a count.",
        flag="samples", metavar="N|FRACTION", check=check_samples,
        more="A fraction gives at most 5000; the scores draw at most 1,000 of them.",
    )  # fmt: skip
    thorough: bool = option(False, RUN, "Run all scores, and look at all classes.")
    cleaned: bool = option(False, RUN, "The model was cleaned: its scores have thresholds of their own.")
