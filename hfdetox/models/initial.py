"""The model that an attack starts from: a trained one, or one of fresh weights for the dataset's classes.

The latter is an architecture, or a folder or Hub id whose weights, or whose head alone, are drawn anew.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfdetox.errors import UsageError
from hfdetox.models import weights as _weights
from hfdetox.models.classifier import Classifier, assemble, fetch_model, load_classifier, peek
from hfdetox.models.loaded import Loaded, label_names, library_of

ARCHITECTURE = "timm-arch:"
# what the dataset says, or what would bring weights (a checkpoint_path may be a pickle)
_NOT_MODEL_ARGS = {
    "num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "model_name", "img_size", "features_only",
}  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")

ClassNames = Callable[[], tuple[str, ...] | int]


@dataclass(frozen=True)
class InitialModel:
    """The model an attack trains.

    Attributes:
        from_scratch: whether its weights were freshly drawn.
        backdoored: whether its own report or card says that it is deliberately backdoored already.
        new_head: whether its head alone was freshly drawn.
    """

    classifier: Classifier
    from_scratch: bool
    backdoored: bool = False
    new_head: bool = False

    @property
    def trained(self) -> bool:
        """Whether its answers mean anything yet."""
        return not (self.from_scratch or self.new_head)


def init_model(
    model: str | Path | nn.Module, *, class_names: ClassNames, is_backdoored: Callable[[Path | None], bool],
    init: str | None = None, model_args: Mapping[str, Any] | None = None, input_size: int | None = None, seed: int = 0,
    revision: str | None = None, trust_remote_code: bool = False, processor: Any = None, preprocessing: Any = None,
    labels: Sequence[str] | int | None = None,
) -> InitialModel:  # fmt: skip
    """Return the model to start from: a trained one as `load_classifier` gives it, or one of freshly drawn weights.

    Args:
        model: what `load_classifier` takes, or `timm-arch:NAME`.
        class_names: gives the dataset's class names, or their number; asked only for a model of fresh weights.
        is_backdoored: tells of a trained model's own files, None without any, whether they say so.
        init: of a folder or Hub id, `random` draws the weights anew, whose config.json is all that is taken then, and
            `head` keeps them below a new head of the dataset's classes.
        model_args: arguments of a `timm-arch`.
        input_size: image height and width of a `timm-arch`; None is the architecture's own.
        seed: determines the weights.

    Raises:
        UsageError: an unknown architecture or argument, a config without weights, options that do not go together.
        HubError: the repository is unknown, gated or unreachable.
    """
    if init not in (None, "random", "head"):
        raise UsageError(f"--init {init} is not known; there is random, which draws the weights anew, and head, which "
                         "draws the head alone")  # fmt: skip
    is_architecture = isinstance(model, str) and model.startswith(ARCHITECTURE)
    if not is_architecture and (model_args or input_size is not None):
        raise UsageError("--model-arg and --input-size describe a timm-arch:NAME; a model that is there has its own")
    if not is_architecture and init is None:
        bare = isinstance(model, str | Path) and (Path(model) / "config.json").is_file()
        if bare and not any(any(Path(str(model)).glob(pattern)) for pattern in _WEIGHTS):
            raise UsageError(f"{model} has a config.json and no weights; draw them with --init random")
        trained = load_classifier(model, revision=revision, processor=processor, preprocessing=preprocessing,
                                  labels=labels, trust_remote_code=trust_remote_code)  # fmt: skip
        return InitialModel(trained, from_scratch=False, backdoored=is_backdoored(trained.folder))
    if isinstance(model, nn.Module):
        raise UsageError(f"--init {init} draws weights of a folder or Hub id; a loaded model has its own")
    if is_architecture and init == "head":
        raise UsageError(f"{model} is an architecture without trained weights; leave --init out")
    if is_architecture and revision is not None:
        raise UsageError(f"{model} is an architecture, which has no revisions; leave --revision out")
    names = class_names()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if is_architecture:
            loaded = _architecture(str(model), names, model_args or {}, input_size)
            return InitialModel(assemble(loaded, str(model), None, names), from_scratch=True)
        new_head = init == "head"
        pulled, name = fetch_model(str(model), revision, trust_remote_code, with_weights=new_head)
        stored = _weights.find_weights(pulled.folder, pulled.weights) if new_head else None
        loaded = _drawn(pulled.folder, name, label_names(names), stored, trust_remote_code)
    classifier = assemble(loaded, name, pulled.revision or None, names)
    return InitialModel(classifier, not new_head, new_head and is_backdoored(pulled.folder), new_head)


def draw_like(model: str, *, revision: str | None, trust_remote_code: bool) -> Classifier:
    """Return a model like that of a Hub id, of its config.json, with weights that are drawn; none are pulled.

    Raises:
        UsageError, HubError: what `load_classifier` raises of a config.json.
    """
    _, labels, _ = peek(model, revision, trust_remote_code)
    pulled, name = fetch_model(model, revision, trust_remote_code, with_weights=None)
    # of a number of one byte there are as many as bytes
    with torch.random.fork_rng([]), _weights.no_larger_than(pulled.size, name):
        return assemble(_drawn(pulled.folder, name, labels, None, trust_remote_code), name, pulled.revision, labels)


def _architecture(name: str, names: tuple[str, ...] | int, model_args: Mapping[str, Any],
                  input_size: int | None) -> Loaded:  # fmt: skip
    from hfdetox.models import timm as _timm

    if wrong := sorted(_NOT_MODEL_ARGS & set(model_args)):
        raise UsageError(f"--model-arg {wrong[0]} cannot be given: the classes come from the dataset, the image size "
                         "from --input-size, and the weights are drawn")  # fmt: skip
    channels = model_args.get("in_chans", 3)
    if type(channels) is not int or channels not in (1, 3):
        raise UsageError(f"--model-arg in_chans={channels}: images have 3 channels (RGB) or 1 (grey)")
    if input_size is not None and input_size < 1:
        raise UsageError(f"--input-size {input_size}: give the images' height and width, such as 32")
    return _timm.new_architecture(name.removeprefix(ARCHITECTURE), num_classes=len(label_names(names)),
                                  model_args=model_args, input_size=input_size)  # fmt: skip


def _drawn(folder: Path, name: str, labels: tuple[str, ...], stored: _weights.StoredWeights | None,
           trust_remote_code: bool) -> Loaded:  # fmt: skip
    """Return a model that a folder's config.json describes, for other labels, with what is stored below its head."""
    if library_of(folder, name) == "timm":
        from hfdetox.models import timm as _timm

        return _timm.new_from_folder(folder, name, num_classes=len(labels), stored=stored)
    from hfdetox.models import transformers as _transformers

    return _transformers.new_from_folder(folder, name, labels=labels, stored=stored,
                                         trust_remote_code=trust_remote_code)  # fmt: skip
