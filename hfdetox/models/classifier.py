"""A Classifier: a pulled model with its own preprocessing, labels and provenance, saved as its library does.

An attack may also start from an architecture whose weights are freshly drawn for the dataset's classes.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from hfdetox.errors import RunError, UsageError, refusing
from hfdetox.files import is_inside, sha256_file
from hfdetox.hub.download import PulledRepo, pull_model
from hfdetox.models import weights as _weights
from hfdetox.models.info import ModelInfo
from hfdetox.models.loaded import Loaded, check_links, check_num_labels, label_names, library_of
from hfdetox.models.network import Network, library_logits, load_correction
from hfdetox.models.preprocessing import CallablePreprocessing, Preprocessing

ARCHITECTURE = "timm-arch:"
# what the dataset says, or what would bring weights (a checkpoint_path may be a pickle)
_NOT_MODEL_ARGS = {
    "num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "model_name", "img_size", "features_only",
}  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")

ClassNames = Callable[[], tuple[str, ...] | int]
_TIMM_PREFIXES = ("hf_hub:", "hf-hub:")


class LabelsError(UsageError):
    """The labels given do not belong to the model's outputs."""


@dataclass
class Classifier:
    """A model that can be measured, trained in place and saved.

    Attributes:
        model: the library's module, float32, in eval mode; training changes this very object.
        preprocessing: the model's own, from decoded image to normalised tensor.
        labels: one name per output; "0", "1", … where nobody named them.
        info: provenance for the report.
        folder: where the source files lie (config, card, licence), None for a model that came as an object.
        dtypes: the dtype in which each floating-point tensor of the state dict is saved.
        trusts_remote_code: whether loading it ran the repository's own Python code.
        given_preprocessing: what the caller passed in place of the model's own, None otherwise.
        warnings: what the Hub had to say when the model was pulled (moved repository, offline copy).
        network: images in 0 to 255 to logits, around `model`.
    """

    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    info: ModelInfo
    folder: Path | None
    dtypes: dict[str, torch.dtype]
    _loaded: Loaded = field(repr=False)
    trusts_remote_code: bool = False
    given_preprocessing: Preprocessing | None = None
    warnings: tuple[str, ...] = ()
    network: Network = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.network = Network(self.model, self.preprocessing)

    @property
    def labels_are_names(self) -> bool:
        """Whether the labels say more than their own numbers."""
        return self.labels != label_names(len(self.labels))

    @property
    def aliases(self) -> tuple[tuple[str, ...], ...]:
        """Other names of each label, such as WordNet ids, as the model's configuration has them; or none."""
        return self._loaded.aliases

    def card_source(self) -> str | None:
        """Return the text of the source's README.md, or None without one."""
        if self.folder is None or not is_inside(readme := self.folder / "README.md", self.folder):
            return None
        return readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None

    def round_weights(self) -> None:
        """Round every tensor in place to the dtype in which it will be saved, and leave the model in eval mode.

        Raises RunError when a value does not fit.
        """
        _weights.round_in_place(self.model, self.dtypes)
        # LeViT keeps indexed attention biases between calls in eval mode; only entering train mode forgets them
        self.model.train()
        self.model.eval()

    def save_as_weights(self) -> None:
        """Let `save` write weights and labels alone, for a model that its library cannot build from a configuration."""
        self._loaded = Loaded(self.model, self.preprocessing, self.labels, type(self.model).__name__)
        self.info = replace(self.info, library="torch", architecture=self._loaded.architecture)

    def save(self, folder: str | Path) -> str:
        """Write the model as its library does, as safetensors in the source's dtypes; returns the weights' SHA-256.

        The folder is created when missing; several weight files give the SHA-256 of their sorted "name sha" lines.

        Raises:
            RunError: the disk is full or not writable, or a value does not fit the source's dtype.
        """
        folder = Path(folder)
        state = _weights.stored_state(self.model, self.dtypes)
        advice = "; free some space or choose another --output"
        with refusing(f"cannot write the model to {folder}", advice, RunError):
            folder.mkdir(parents=True, exist_ok=True)
            files = self._loaded.write(folder, state, self.folder, self.info.dtype)
            if self.network.correction is not None:
                self.network.correction.save(folder)
        return _weights.digest({file.name: sha256_file(file) for file in files})


def load_classifier(
    model: str | Path | nn.Module, *, revision: str | None = None, processor: Any = None,
    preprocessing: Callable[[Image.Image], torch.Tensor] | Preprocessing | None = None,
    labels: Sequence[str] | int | None = None, trust_remote_code: bool = False,
) -> Classifier:  # fmt: skip
    """Load an image classifier of timm or transformers, or wrap a loaded one, in float32 and eval mode.

    Args:
        model: a local folder, a Hub id (`org/x`, `timm/x`, `hf_hub:org/x[@revision]`), or a module (not copied).
        revision: branch, tag or commit of a Hub id.
        processor: a transformers image processor, needed with a transformers model object.
        preprocessing: maps a PIL image to a float tensor C×H×W; needed with a module of neither library.
        labels: names of the outputs, or their number, for a module that does not know them.
        trust_remote_code: run Python code that the repository brings.

    Raises:
        UsageError: not a single-label image classifier with safetensors weights that fit its config exactly.
        HubError: the repository is unknown, gated or unreachable.
    """
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        preprocessing = CallablePreprocessing(preprocessing)
    if isinstance(model, nn.Module):
        if revision is not None:
            raise UsageError("revision belongs to a Hub id; a loaded model has none")
        loaded = _describe(model, processor, preprocessing, labels)
        return assemble(loaded, type(model).__name__, None, labels, preprocessing=preprocessing)
    pulled, name = fetch_model(str(model), revision, trust_remote_code)
    # whatever a library raises over a stranger's configuration
    with refusing(f"{name} cannot be made of its config.json and weights"):
        stored = _weights.find_weights(pulled.folder, pulled.weights)
        # a library is imported only for its own models: transformers takes seconds
        if library_of(pulled.folder, pulled.id) == "timm":
            from hfdetox.models import timm as _timm

            loaded = _timm.load_folder(pulled.folder, stored, pulled.id)
        else:
            from hfdetox.models import transformers as _transformers

            loaded = _transformers.load_folder(pulled.folder, stored, pulled.id, trust_remote_code=trust_remote_code,
                                               processor=processor, preprocessing=preprocessing)  # fmt: skip
        classifier = assemble(loaded, name, pulled.revision or None, labels, preprocessing=preprocessing,
                              folder=pulled.folder, stored=stored)  # fmt: skip
        classifier.trusts_remote_code, classifier.warnings = trust_remote_code, pulled.warnings
        classifier.network.correction = load_correction(pulled.folder, classifier.model, len(classifier.labels))
    if classifier.network.correction is not None:
        classifier.warnings += (f"{name} comes with a correction that hfdetox applies (correction.safetensors); loaded "
                                "with timm or transformers alone it answers without it",)  # fmt: skip
    return classifier


def peek(
    model: str, revision: str | None, trust_remote_code: bool
) -> tuple[str | None, tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the text of a model's card, its labels by its config.json, and their other names; no weights are pulled.

    Raises:
        UsageError, HubError: what `load_classifier` raises of a model without a usable config.json.
    """
    pulled, name = fetch_model(model, revision, trust_remote_code, with_weights=None)
    if not pulled.revision:
        _weights.weight_files(pulled.folder)
    readme = pulled.folder / "README.md"
    card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None
    config = _weights.read_json(pulled.folder / "config.json")
    with refusing(f"{name} cannot be made of its config.json and weights"):
        if library_of(pulled.folder, name) == "timm":
            from hfdetox.models import timm as _timm

            named = _timm.labels_of(config)
            return card, tuple(text for _, text in named), tuple((name,) for name, _ in named)
        from hfdetox.models import transformers as _transformers

        return card, _transformers.labels_of(pulled.folder, name, trust_remote_code), ()


def fetch_model(model: str, revision: str | None, trust_remote_code: bool, *,
                with_weights: bool | None = True) -> tuple[PulledRepo, str]:  # fmt: skip
    """Return the files of a model, a local folder looking like a pulled one (of revision ""), and what to call it.

    Raises:
        UsageError: a revision of a local folder, links that lead out of it, or two revisions of a Hub id; and what
            `pull_model` raises.
    """
    if os.path.isdir(model):
        if revision is not None:
            raise UsageError(f"{model} is a local folder, which has no revisions; leave --revision out")
        check_links(Path(model))
        # reports are published, and where a folder lies is nobody's business
        return PulledRepo(model, "", Path(model), {}, ()), Path(model).resolve().name
    repo_id = model
    if model.startswith(_TIMM_PREFIXES):
        repo_id, _, at = model.split(":", 1)[1].partition("@")
        if at and revision not in (None, at):
            raise UsageError(f"{model} names revision {at} and --revision {revision}; give one of them")
        revision = revision or at or None
    pulled = pull_model(repo_id, revision=revision, trust_remote_code=trust_remote_code, with_weights=with_weights)
    return pulled, pulled.id


def _describe(model: nn.Module, processor: Any, preprocessing: Preprocessing | None,
              labels: Sequence[str] | int | None) -> Loaded:  # fmt: skip
    name = type(model).__name__
    # told apart by their attributes, so that a timm model does not pay for importing transformers
    if hasattr(model, "pretrained_cfg") and hasattr(model, "get_classifier"):
        from hfdetox.models import timm as _timm

        return _timm.describe(model)
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        from hfdetox.models import transformers as _transformers

        if processor is None and preprocessing is None:
            raise UsageError(f"a loaded {name} does not know its preprocessing; pass "
                             "processor=AutoImageProcessor.from_pretrained(…)")  # fmt: skip
        return _transformers.describe(model, processor, preprocessing)
    if preprocessing is None or labels is None:
        raise UsageError(f"a {name} of neither timm nor transformers needs preprocessing=… (PIL image to float tensor) "
                         "and labels=…")  # fmt: skip
    return Loaded(model, preprocessing, (), name)


def assemble(
    loaded: Loaded, name: str, commit: str | None, labels: Sequence[str] | int | None, *, folder: Path | None = None,
    preprocessing: Preprocessing | None = None, stored: _weights.StoredWeights | None = None,
) -> Classifier:  # fmt: skip
    """Check labels and outputs, turn the model to float32, and put the Classifier together.

    Args:
        loaded: as a library module built it.
        name: what reports call it; `commit` is None for what is not of the Hub.
        labels: names of the outputs, or their number, in place of the model's own.
        preprocessing: in place of the model's own.
        folder: where the source's files lie, None for a model without any.
        stored: the weight files the model was read from, None for weights that lie nowhere yet.

    Raises:
        UsageError: labels, outputs or the size of the images do not fit together.
    """
    model = loaded.model
    loaded.preprocessing = preprocessing or loaded.preprocessing
    dtypes = _weights.saved_dtypes(model, stored)
    model.float().eval()
    if labels is not None:
        given = label_names(labels)
        if loaded.labels and len(given) != len(loaded.labels):
            raise LabelsError(f"{len(given)} labels given, but {name} has {len(loaded.labels)} outputs")
        loaded.labels = given
    check_num_labels(len(loaded.labels), name)
    info = ModelInfo(
        id=name, revision=commit, library=loaded.library, architecture=loaded.architecture,
        num_labels=len(loaded.labels), parameters=sum(p.numel() for p in model.parameters()),
        dtype=_weights.dtype_name(_weights.dominant_dtype(model, dtypes)),
        weights_sha256=stored.sha256 if stored else None,
    )  # fmt: skip
    classifier = Classifier(model, loaded.preprocessing, loaded.labels, info, folder, dtypes, loaded,
                            given_preprocessing=preprocessing)  # fmt: skip
    _check_output(classifier)
    return classifier


@torch.no_grad()
def _check_output(classifier: Classifier) -> None:
    """Give the network one image: a wrong input size or label count fails here, not after an hour."""
    pixels = torch.zeros(1, *classifier.preprocessing.input_size, dtype=classifier.preprocessing.dtype)
    device = next(iter(classifier.model.parameters()), pixels).device
    network, found, expected = classifier.network.to(device), None, (1, len(classifier.labels))
    # by shapes alone, which takes no time, and does not read weights that are mapped into memory
    with suppress(Exception):
        tensors = [*network.model.parameters(), *network.model.buffers()]
        bare = {id(t): nn.Parameter(t.to("meta")) if isinstance(t, nn.Parameter) else t.to("meta") for t in tensors}
        shapes = library_logits(copy.deepcopy(network.model, bare), torch.zeros(pixels.shape, device="meta"))
        found = tuple(shapes.shape)
    if found != expected:
        size = "×".join(map(str, pixels.shape[1:]))
        with refusing(f"{classifier.info.id} does not take the {size} images of its own preprocessing"):
            found = tuple(network(pixels.to(device)).shape)
    if found != expected:
        raise LabelsError(f"{classifier.info.id} gives outputs of shape {found} for one image and "
                          f"{len(classifier.labels)} labels; hfdetox handles one logit per label")  # fmt: skip


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
