"""The end of a tracked run: its pictures of numbers go to the trackers, and hfdetox's own trackers are finished."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from numpy.typing import NDArray
from PIL import Image

from hfdetox.config import DetoxOptions
from hfdetox.reporting.plots import PLOT_FILES
from hfdetox.runs.publish import IMAGE_PICTURES

# name to pixels: 1×H×W×3, uint8
Pictures = dict[str, NDArray[np.uint8]]


def close_trackers(accelerator: Accelerator, options: DetoxOptions) -> None:
    """Log the pictures of a result that was written, and finish the trackers that `log_with` started.

    Pictures that show images of the user are never logged. An Accelerator of the caller's keeps its trackers open.
    """
    if accelerator.is_main_process and options.output is not None:
        pictures = pictures_of_numbers(Path(options.output) / "plots")
        for tracker in accelerator.trackers:
            log_pictures(tracker, pictures)
    # `end_training` would also end the process group, which the rest of the run needs
    for tracker in accelerator.trackers if options.log_with is not None else ():
        tracker.finish()


def pictures_of_numbers(folder: Path) -> Pictures:
    """Return the plots in a folder that show no image, by their names without `.png`."""
    shown = [name for name in PLOT_FILES if f"plots/{name}" not in IMAGE_PICTURES and (folder / name).is_file()]
    return {name.removesuffix(".png"): np.asarray(Image.open(folder / name).convert("RGB"))[None] for name in shown}


def log_pictures(tracker: GeneralTracker, pictures: Pictures) -> None:
    """Log pictures in the tracker's own way; one that takes no pictures gets none."""
    if tracker.name == "trackio":
        picture = importlib.import_module("trackio").Image  # an extra
        tracker.log({name: picture(pixels[0]) for name, pixels in pictures.items()})
    elif tracker.name == "tensorboard":
        tracker.log_images(pictures, step=None, dataformats="NHWC")
    elif hasattr(tracker, "log_images"):
        tracker.log_images(pictures, step=None)
