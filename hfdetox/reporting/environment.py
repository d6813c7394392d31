"""What a run runs on: the packages and the device, the command that repeats it, and the secrets left out of both."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hfdetox.errors import UsageError, one_line
from hfdetox.reporting.report import EnvironmentInfo

if TYPE_CHECKING:
    import torch

MASK = "***"
# a name after a slash is a repository's ("org/hf_…"), not a token
_TOKEN = re.compile(r"(?<![A-Za-z0-9_/])hf_(?:(?:oauth|jwt|app)_[\w.\-]{8,}|[A-Za-z0-9]{16,})")
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SHORTEST_SECRET = 8  # masking a shorter value would tear ordinary words out of a message


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
    versions = {name: _version(name) for name in ("torch", "accelerate", "transformers", "timm", "datasets")}
    return EnvironmentInfo(python=platform.python_version(), **versions, device=device_name(device), seed=seed,
                           command=mask_secrets(command))  # fmt: skip


def device_name(device: str | torch.device) -> str:
    """Return the device with its maker's name, such as `cuda:0 (NVIDIA H200)`."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({_processor()})"


def mask_secrets(text: str) -> str:
    """Return `text` with everything that is or looks like a token replaced by `***`."""
    # the longest first: one secret may contain another
    for secret in sorted(_known_secrets(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return _URL_LOGIN.sub(MASK, _TOKEN.sub(MASK, text))


def _known_secrets() -> set[str]:
    """Return this person's own tokens, whatever their form."""
    secrets = {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    # the saved token can be in a message only if the client has been imported
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import get_token

        secrets.add(get_token() or "")
    return {secret for secret in (s.strip() for s in secrets) if len(secret) >= _SHORTEST_SECRET}


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
