"""What `timm.py` and `transformers.py` hand to `classifier.py`: a built model with everything that belongs to it."""

import fnmatch
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from safetensors.torch import save_file

from hfdetox.errors import UsageError, located
from hfdetox.files import is_inside
from hfdetox.models.preprocessing import Preprocessing
from hfdetox.models.weights import WEIGHTS_NAME, read_json
from hfdetox.values import Shape, check_known, shown

Library = Literal["timm", "transformers", "torch"]

# Files that travel with a model unchanged. The card is not among them: hfdetox writes its own and keeps the text.
_COMPANIONS = ("preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*")


# what is read of a model's folder, by hfdetox or by the model's library
_READ = ("*.json", "*.safetensors", "*.py", "README.md", "LICENSE*", "NOTICE*")


# what is read of a config.json, by hfdetox or by the library: the rest is the library's to judge
_Side = Annotated[int, Shape("must be a whole number from 1 to 4096, got {}", lambda n: 1 <= n <= 4096)]
_Size = Annotated[list[_Side], Shape("must be channels, height and width, got {}", lambda x: len(x) == 3)]
_Scale = Annotated[float, Shape("must be above 0, got {}", lambda x: x > 0)]
_Resize = Literal["bicubic", "bilinear", "nearest", "box", "hamming", "lanczos", "random"]
_Means = Annotated[list[float], Shape("must be one number a channel, got {}", bool)]
_Classes = Annotated[
    int, Shape("must be a whole number, got {}, not one from 0 to 1000000", lambda n: 0 <= n <= 1_000_000)
]
_NAMES = {"architecture": str, "num_classes": _Classes, "label_names": list[str | int] | dict[str, str],
          "label_descriptions": dict[str, str]}  # fmt: skip
_TIMM = _NAMES | {"model_args": dict[str, Any], "pretrained_cfg": dict[str, Any]}
_TIMM_IMAGES = _NAMES | {
    "input_size": _Size, "test_input_size": _Size, "mean": _Means, "std": list[_Scale], "crop_pct": _Scale,
    "test_crop_pct": _Scale, "crop_mode": str, "interpolation": _Resize, "first_conv": str | list[str],
    "classifier": str | list[str], "tag": str, "pool_size": list[int],
}  # fmt: skip
_Number = Annotated[int, Shape("must be a whole number from 1 to 100000, got {}", lambda n: 1 <= n <= 100_000)]
_TRANSFORMERS = {
    "model_type": str, "architectures": list[str], "id2label": dict[str, str | int | float], "auto_map": dict[str, Any],
    "problem_type": str, "num_labels": _Classes, "num_channels": _Side, "num_hidden_layers": _Number,
    "hidden_size": _Number, "pretrained_cfg": dict[str, Any],
}  # fmt: skip


class NotAClassifierError(UsageError):
    """The model does not give one logit per label, one label per image."""


@dataclass
class Loaded:
    """A built model of no library; each library's own kind knows how that library writes it.

    `processor` is an image processor that is not among the source's files and is saved too; `aliases` are other names
    of each label, or none.
    """

    model: Any
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    architecture: str
    processor: Any = None
    aliases: tuple[tuple[str, ...], ...] = ()
    library: ClassVar[Library] = "torch"

    def write(self, folder: Path, state: dict[str, torch.Tensor], source: Path | None, dtype: str) -> list[Path]:
        """Write configuration and weights as the library does, and return the weight files.

        Args:
            folder: where to.
            state: the tensors to be saved, most of them in `dtype`.
            source: where the files lie that the model was read from; None without any.
        """
        (folder / "config.json").write_text(json.dumps(self.config(source), indent=2) + "\n", encoding="utf-8")
        copy_companions(source, folder)
        save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        return [folder / WEIGHTS_NAME]

    def config(self, source: Path | None) -> dict[str, Any]:
        """Return what config.json says of the model."""
        return {"library_name": "torch", "class_name": self.architecture, "num_classes": len(self.labels),
                "label_names": list(self.labels)}  # fmt: skip


def library_of(folder: Path, name: str) -> Library:
    """Return the library whose config.json lies in a model's folder; UsageError when it is of neither."""
    config = read_json(folder / "config.json")
    for side in ("preprocessor_config.json", "processor_config.json"):
        if (folder / side).is_file():
            read_json(folder / side)
    with located(f"the config.json of {name}"):
        if "architecture" in config and "model_type" not in config:
            check_known("", config, _TIMM)
            check_known("", config, _TIMM_IMAGES)
            check_known("pretrained_cfg", config.get("pretrained_cfg") or {}, _TIMM_IMAGES)
            check_label_keys(config)
            # older timm leaves in it how many classes the network was pretrained for
            own = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
            check_label_keys({**(config.get("pretrained_cfg") or {}), **own})
            return "timm"
        if "model_type" in config or "auto_map" in config:
            check_known("", config, _TRANSFORMERS)
            check_label_keys(config)
            return "transformers"
    raise UsageError(f"{name} is not an image classifier of timm or transformers: its config.json has neither "
                     "architecture nor model_type")  # fmt: skip


def check_label_keys(config: Mapping[str, Any]) -> None:
    """Raise UsageError where a configuration names its labels by other keys than 0, 1, ….

    The libraries would leave names out, and the dataset's classes would be blamed. timm's configurations may leave some
    out: these are called by their index.
    """
    for field in ("id2label", "label_names"):
        named = config.get(field)
        keys = [str(key) for key in named] if isinstance(named, Mapping) else []
        known = {int(key) for key in keys if key.isdecimal()}
        count = config.get("num_classes") if field == "label_names" else None
        some = isinstance(count, int) and len(known) == len(keys) and 0 in known and max(known) < count
        if known != set(range(len(keys))) and not some:
            raise UsageError(f"{field} must have the whole numbers 0 to {len(keys) - 1} as keys, one for each of its "
                             f"{len(keys)} labels, got {', '.join(map(shown, keys[:8]))}; mend it")  # fmt: skip


def label_names(labels: Sequence[str] | int) -> tuple[str, ...]:
    """Return the names, or "0", "1", … where their number is all that is known."""
    return tuple(map(str, range(labels))) if isinstance(labels, int) else tuple(labels)


def check_num_labels(count: int, name: str) -> None:
    """Raise NotAClassifierError for fewer than two outputs."""
    if count < 2:
        found = "a single output" if count else "no classification head"
        raise NotAClassifierError(f"{name} has {found}; hfdetox handles classifiers of two or more labels")


def copy_companions(source: Path | None, folder: Path, extra: Sequence[str] = ()) -> None:
    """Copy preprocessing configs, licence files and the `extra` patterns, byte for byte, none from outside it."""
    if source is None:
        return
    for file in (file for pattern in (*_COMPANIONS, *extra) for file in sorted(source.glob(pattern))):
        if file.is_file() and is_inside(file, source):
            shutil.copyfile(file, folder / file.name)


def check_links(folder: Path) -> None:
    """Raise UsageError when a file that would be read of a model's folder is a link that leads out of it, or a pipe.

    Who sends a folder could else have any file of this machine published with the cleaned model, or let it wait.
    """
    for file in sorted(folder.iterdir()):
        if not any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _READ):
            continue
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UsageError(f"{file} is no plain file; remove it, or get the model anew")
        if file.is_symlink() and not is_inside(file, folder):
            raise UsageError(f"{file} is a link to something outside the model's folder, which is not read; if it is "
                             "yours, put the file itself there")  # fmt: skip
