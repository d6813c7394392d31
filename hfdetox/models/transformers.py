"""transformers: load an image classifier and its processor from a folder, and write them back in their own format."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import logging

from hfdetox.errors import UsageError, located, one_line, refusing
from hfdetox.hub.download import ADAPTER, no_weights
from hfdetox.models.layers import head_layers
from hfdetox.models.loaded import (
    Loaded,
    NotAClassifierError,
    check_label_keys,
    check_num_labels,
    copy_companions,
    label_names,
)
from hfdetox.models.preprocessing import Preprocessing, PreprocessingError, ProcessorPreprocessing, TimmPreprocessing
from hfdetox.models.weights import StoredWeights, raise_for_keys

_ADVICE = "; mend its config.json, or try a newer transformers"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and loading reports from the screen: hfdetox says the same in one line."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class TransformersModel(Loaded):
    """A model of transformers, saved in transformers' own names."""

    library = "transformers"

    @_quiet()
    def write(self, folder: Path, state: dict[str, torch.Tensor], source: Path | None, dtype: str) -> list[Path]:
        """Write configuration, processor and weights, and return the weight files."""
        self.model.save_pretrained(folder, state_dict=state)
        if source:
            # byte for byte what was published: save_pretrained would add this version's defaults and drop unknown keys
            copy_companions(source, folder, extra=("config.json", "*.py"))
        else:
            self.model.config.dtype = dtype
            self.model.config.save_pretrained(folder)
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        return sorted(folder.glob("model*.safetensors"))


@_quiet()
def load_folder(folder: Path, stored: StoredWeights, name: str, *, trust_remote_code: bool, processor: Any = None,
                preprocessing: Preprocessing | None = None) -> Loaded:  # fmt: skip
    """Load a local transformers folder in float32, from safetensors, strictly.

    Raises:
        NotAClassifierError: config.json does not describe a single-label image classifier.
        WeightsMismatchError: the checkpoint lacks tensors of the model, or has others.
        UsageError: it needs a newer transformers or code from the repository.
    """
    config = _load_config(folder, name, trust_remote_code)
    _check_config(config, name, trust_remote_code)
    if (folder / ADAPTER).is_file():
        # transformers would fetch the base model that the adapter names, at no particular commit
        raise no_weights(name, [ADAPTER], lambda: folder / ADAPTER)
    model, info = _pretrained(folder, config, name, trust_remote_code)
    unexpected = _not_computed(model, info["unexpected_keys"])
    raise_for_keys(name, info["missing_keys"], unexpected, info["mismatched_keys"])
    if processor is not None or preprocessing is not None:
        return describe(model, processor, preprocessing)
    loaded = describe(model, _load_processor(folder, name, trust_remote_code), None)
    loaded.processor = None  # its files are copied from the source
    return loaded


@_quiet()
def new_from_folder(folder: Path, name: str, *, labels: Sequence[str], trust_remote_code: bool,
                    stored: StoredWeights | None = None) -> Loaded:  # fmt: skip
    """Build the image classifier of a folder's config.json for other labels, with freshly drawn weights.

    Args:
        stored: weights that are taken over, but for the head, which alone is drawn then.

    Raises:
        NotAClassifierError: config.json does not describe a model that can be a single-label image classifier.
        WeightsMismatchError: `stored` lacks tensors below the head.
        UsageError: it needs a newer transformers or code from the repository, or has no preprocessor_config.json.
    """
    config = _load_config(folder, name, trust_remote_code)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    # the head is drawn too, so it does not matter which one the weights had
    config.architectures = None
    _check_config(config, name, trust_remote_code)
    if stored is not None:
        model = _below_the_head(folder, config, name, trust_remote_code)
    else:
        with refusing(f"transformers cannot build {name} from its config.json", _ADVICE):
            model = AutoModelForImageClassification.from_config(config, dtype=torch.float32,
                                                                trust_remote_code=trust_remote_code)  # fmt: skip
    return describe(model, _load_processor(folder, name, trust_remote_code), None)


def _pretrained(folder: Path, config: Any, name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    with refusing(f"transformers cannot load {name}", _ADVICE):
        return AutoModelForImageClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code,
            local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True)  # fmt: skip


def _below_the_head(folder: Path, config: Any, name: str, trust_remote_code: bool) -> Any:
    """Return the stored model with a new head; what was trained on top of it otherwise (a decoder) is left."""
    model, info = _pretrained(folder, config, name, trust_remote_code)
    heads = head_layers(model)

    def below(key: str) -> bool:
        return key.startswith(f"{model.base_model_prefix}.") and key.rpartition(".")[0] not in heads

    raise_for_keys(name, filter(below, info["missing_keys"]), [],
                   [shapes for shapes in info["mismatched_keys"] if below(shapes[0])])  # fmt: skip
    for head in heads:
        model.get_submodule(head).reset_parameters()
    return model


def _not_computed(model: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Leave out tables that older versions stored and this one computes, such as Swin's relative positions."""
    stored = model.state_dict().keys()
    computed = {name.rpartition(".")[2] for name, _ in model.named_buffers() if name not in stored}
    return [name for name in unexpected if name.rpartition(".")[2] not in computed]


@_quiet()
def labels_of(folder: Path, name: str, trust_remote_code: bool) -> tuple[str, ...]:
    """Return the labels of a folder's config.json; raises what `load_folder` raises of one that will not do."""
    config = _load_config(folder, name, trust_remote_code)
    _check_config(config, name, trust_remote_code)
    return _labels(config)


def _labels(config: Any) -> tuple[str, ...]:
    labels = tuple(str(config.id2label.get(index, index)) for index in range(config.num_labels))
    # what transformers writes when nobody named the labels
    return label_names(len(labels)) if labels == tuple(f"LABEL_{index}" for index in range(len(labels))) else labels


def _load_config(folder: Path, name: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UsageError(f"{name} brings its own Python code, which hfdetox runs only with --trust-remote-code; "
                             "read that code first") from error  # fmt: skip
        raise UsageError(
            f"transformers cannot read the config.json of {name}: {one_line(error, 120)}{_ADVICE}"
        ) from error


# image classifiers whose images are no pixels, and what they take
_NO_PIXELS = {"imagegpt": "colours as a row of tokens", "siglip2": "patches of any number",
              "shieldgemma2": "a question in words beside each image"}  # fmt: skip


def _check_config(config: Any, name: str, trust_remote_code: bool) -> None:
    """Refuse what is not a classifier of one label per image, before its weights are read."""
    # with its own code trusted, any config may belong to a classifier; loading decides
    remote = trust_remote_code and "AutoModelForImageClassification" in getattr(config, "auto_map", {})
    if not remote:
        if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            raise NotAClassifierError(f"{name} is not an image classifier (model type {config.model_type}); give one "
                                      "that AutoModelForImageClassification loads")  # fmt: skip
        known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        names = {c.__name__ for c in (known if isinstance(known, tuple) else (known,))}
        if config.architectures and not names & set(config.architectures):
            raise NotAClassifierError(f"{name} is not an image classifier but a {config.architectures[0]}; give a "
                                      "model with a trained classification head")  # fmt: skip
    if taken := _NO_PIXELS.get(config.model_type):
        raise NotAClassifierError(f"{name} is of type {config.model_type}, which takes {taken}; hfdetox handles models "
                                  "that take pixels of one size")  # fmt: skip
    if getattr(config, "problem_type", None) not in (None, "single_label_classification"):
        raise NotAClassifierError(f"{name} is a {config.problem_type} model; hfdetox handles one label per image")
    if getattr(config, "quantization_config", None) is not None:
        raise NotAClassifierError(f"{name} is quantized and cannot be trained; give the unquantized model")
    check_num_labels(config.num_labels, name)
    with located(f"the config of {name}"):
        check_label_keys({"id2label": config.id2label})


def _load_processor(folder: Path, name: str, trust_remote_code: bool) -> Any:
    advice = "; pass processor=… or preprocessing=… through the API"
    with refusing(f"{name} has no usable preprocessor_config.json", advice, PreprocessingError):
        # the default backend, as `pipeline` takes it: the backends' resizes differ by up to several grey levels
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def describe(model: Any, processor: Any, preprocessing: Preprocessing | None) -> Loaded:
    """Return what hfdetox needs to know of a transformers model; one of `processor` and `preprocessing` is given."""
    config = model.config
    _check_config(config, type(model).__name__, trust_remote_code=True)
    labels = _labels(config)
    preprocessing = preprocessing or _preprocessing(processor, config)
    return TransformersModel(model, preprocessing, labels, type(model).__name__, processor)


def _preprocessing(processor: Any, config: Any) -> Preprocessing:
    """Return the preprocessing of an image processor; of a multi-modal processor its image part."""
    processor = getattr(processor, "image_processor", processor)
    if hasattr(processor, "val_transforms") and hasattr(processor, "data_config"):
        return TimmPreprocessing(processor.data_config)  # the timm wrapper's processor is timm's own transform
    if getattr(config, "pretrained_cfg", None):
        return ProcessorPreprocessing(processor, channels=int(config.pretrained_cfg.get("input_size", (3,))[0]))
    given = (getattr(holder, "num_channels", None) for holder in (config, getattr(config, "vision_config", None)))
    return ProcessorPreprocessing(processor, channels=int(next(filter(None, given), 3)))
