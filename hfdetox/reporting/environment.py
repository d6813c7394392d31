"""What a run runs on: the packages and the device, the command that repeats it, and the secrets left out of both."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from hfdetox.errors import UsageError, one_line
from hfdetox.logging import mask_secrets as mask_secrets
from hfdetox.reporting.report import EnvironmentInfo

if TYPE_CHECKING:
    import torch


class TorchvisionMismatchError(UsageError):
    """torch and torchvision are not builds of one release for one device, so that torchvision cannot be imported."""


def check_torchvision() -> None:
    """Import torchvision ahead of the libraries that need it.

    Raises:
        TorchvisionMismatchError: it does not fit the installed torch ("operator torchvision::nms does not exist",
            another CUDA version, missing symbols), which would otherwise surface as a traceback from inside timm.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        raise TorchvisionMismatchError(
            f"torch {_version('torch')} and torchvision {_version('torchvision')} do not fit together "
            f"({one_line(error) or type(error).__name__}); remove both and install both from one channel: "
            "pip uninstall -y torch torchvision, then pip install torch torchvision "
            "(with the same --index-url for the two, if any)"
        ) from error


def describe_environment(device: str | torch.device, *, seed: int, command: str) -> EnvironmentInfo:
    """Return the report's `environment`.

    Args:
        device: where the run ran, such as `cpu` or `cuda:0`; recorded with the device's own name.
        seed: the run's seed.
        command: what repeats the run; tokens in it are masked.
    """
    import torch

    versions = {name: _version(name) for name in ("torch", "accelerate", "transformers", "timm", "datasets")}
    return EnvironmentInfo(python=platform.python_version(), **versions, device=device_name(device), seed=seed,
                           command=mask_secrets(command), threads=torch.get_num_threads())  # fmt: skip


def device_name(device: str | torch.device) -> str:
    """Return the device with its maker's name, such as `cuda:0 (NVIDIA H200)`."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({_processor()})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _processor() -> str:
    """Return the processor's model; Linux tells it in /proc/cpuinfo only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*models, platform.processor()]), platform.machine())
