"""A Classifier: a pulled model with its own preprocessing, labels and provenance, saved as its library does."""

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from hfdetox.documents import card_header
from hfdetox.errors import RunError, UsageError, refusing
from hfdetox.files import is_inside, sha256_file
from hfdetox.hub.download import PulledRepo, pull_model
from hfdetox.models import weights as _weights
from hfdetox.models.info import ModelInfo
from hfdetox.models.loaded import Loaded, check_links, check_num_labels, label_names, library_of
from hfdetox.models.network import Network, library_logits, load_correction
from hfdetox.models.preprocessing import CallablePreprocessing, Preprocessing
from hfdetox.values import shown

_ADVICE = "; mend its config.json, or choose another model"
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
        return None if self.folder is None else _card_of(self.folder)

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
    with refusing(f"{name} cannot be made of its config.json and weights", _ADVICE):
        stored = _weights.find_weights(pulled.folder, pulled.weights)
        with _weights.no_larger_than(stored.numbers, pulled.id):
            loaded = _load(pulled, stored, processor, preprocessing, trust_remote_code)
        classifier = assemble(loaded, name, pulled.revision or None, labels, preprocessing=preprocessing,
                              folder=pulled.folder, stored=stored)  # fmt: skip
        classifier.trusts_remote_code, classifier.warnings = trust_remote_code, pulled.warnings
        classifier.warnings += _card_warnings(classifier.card_source())
        classifier.network.correction = load_correction(pulled.folder, classifier.model, len(classifier.labels))
    if classifier.network.correction is not None:
        classifier.warnings += (f"{name} comes with a correction that hfdetox applies (correction.safetensors); loaded "
                                "with timm or transformers alone it answers without it",)  # fmt: skip
    return classifier


def _load(
    pulled: PulledRepo, stored: _weights.StoredWeights, processor: Any, preprocessing: Preprocessing | None,
    trust_remote_code: bool,
) -> Loaded:  # fmt: skip
    # a library is imported only for its own models: transformers takes seconds
    if library_of(pulled.folder, pulled.id) == "timm":
        from hfdetox.models import timm as _timm

        return _timm.load_folder(pulled.folder, stored, pulled.id)
    from hfdetox.models import transformers as _transformers

    return _transformers.load_folder(pulled.folder, stored, pulled.id, trust_remote_code=trust_remote_code,
                                     processor=processor, preprocessing=preprocessing)  # fmt: skip


def _card_of(folder: Path) -> str | None:
    """Return the text of a model's card, None without one in its folder; UsageError where it may not be read."""
    readme = folder / "README.md"
    with refusing(f"{readme} cannot be read"):
        if not is_inside(readme, folder) or not readme.is_file():
            return None
        return readme.read_text(encoding="utf-8", errors="replace")


def _card_warnings(card: str | None) -> tuple[str, ...]:
    """Return what a person must know of a model's card: nothing, or that it does not tell the licence."""
    lost = "what it says of the licence is not taken over; see to that before you publish"
    try:
        licence = card_header(card).get("license")
    except ValueError as error:
        return (f"the YAML of the model's card (README.md) cannot be read ({error}): {lost}",)
    items = licence if isinstance(licence, list) else [] if licence is None else [licence]
    if all(isinstance(item, str) for item in items):
        return ()
    return (f"the license of the model's card (README.md) is {shown(licence)}, no text: {lost}",)


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
    card = _card_of(pulled.folder)
    config = _weights.read_json(pulled.folder / "config.json")
    with refusing(f"{name} cannot be made of its config.json and weights", _ADVICE):
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
        with refusing(f"{classifier.info.id} does not take the {size} images of its own preprocessing", _ADVICE):
            found = tuple(network(pixels.to(device)).shape)
    if found != expected:
        raise LabelsError(f"{classifier.info.id} gives outputs of shape {found} for one image and "
                          f"{len(classifier.labels)} labels; hfdetox handles one logit per label")  # fmt: skip
