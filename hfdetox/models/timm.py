"""timm: build a model from a folder's config.json, and write a folder that timm and transformers both load."""

import difflib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch

from hfdetox.errors import UsageError, one_line, refusing
from hfdetox.models.loaded import Loaded, label_names
from hfdetox.models.preprocessing import TimmPreprocessing, timm_data_config
from hfdetox.models.weights import StoredWeights, WeightsMismatchError, check_same_tensors, read_json

# Where weights come from and how to convert them: what is saved is native and stands beside its config.
_SOURCE_KEYS = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset", "state_dict")


class TimmModel(Loaded):
    """A model of timm, saved so that timm and transformers both load it."""

    library = "timm"

    def config(self, source: Path | None) -> dict[str, Any]:
        """Return the source's config.json, or timm's own description of a model that came as an object."""
        return _portable(read_json(source / "config.json") if source else _export_config(self.model, self))


def load_folder(folder: Path, stored: StoredWeights, name: str) -> Loaded:
    """Build the model of a local timm folder with its weights.

    Raises:
        UsageError: the architecture is unknown, or the model has no classifier.
        WeightsMismatchError: the file holds other tensors than the model, and timm cannot convert them.
    """
    config = read_json(folder / "config.json")
    advice = "; mend its config.json, or try a newer timm"
    with refusing(f"timm {timm.__version__} cannot build {name} from its config.json", advice):
        model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    state, expected = stored.load(), model.state_dict()
    if {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in expected.items()}:
        model.load_state_dict(state)
        return describe(model, config)
    # timm converts a checkpoint in another naming or with a background class; strict, as timm is by default
    no_conversion = state.keys() <= expected.keys() and "label_offset" not in model.pretrained_cfg
    # with another number of classes timm would drop the head without a word
    if no_conversion or len(stored.files) > 1 or model.num_classes != model.pretrained_cfg.get("num_classes"):
        check_same_tensors(expected, state, name)
    try:
        # `file` names the safetensors: a local-dir source may prefer a pickle that lies beside it
        overlay = {"source": "file", "file": str(stored.files[0])}
        converted = timm.create_model(f"local-dir:{folder}", pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, AssertionError) as error:
        check_same_tensors(expected, state, name)
        raise WeightsMismatchError(f"timm cannot convert the weights of {name} ({one_line(error, 120)})") from error
    return describe(converted, config)


def new_architecture(architecture: str, *, num_classes: int, model_args: Mapping[str, Any],
                     input_size: int | None) -> Loaded:  # fmt: skip
    """Build a registered architecture with freshly drawn weights, and its own mean and std.

    Args:
        model_args: further keyword arguments of the architecture, such as `depth`.
        input_size: height and width of the images, shown whole (crop_pct 1); None takes the architecture's own.

    Raises:
        UsageError: timm does not know the architecture or cannot build it with these arguments.
    """
    if not timm.is_model(architecture):
        close = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=3))
        advice = f"; close to it: {close}" if close else ""
        raise UsageError(f"timm {timm.__version__} has no architecture {architecture!r}{advice}")
    given = timm.models.get_pretrained_cfg(architecture)
    cfg = given.to_dict() if given is not None else {}
    channels = model_args.get("in_chans", 3)
    overlay: dict[str, Any] = {"num_classes": num_classes}
    if input_size is not None or channels != 3:
        height, width = (input_size, input_size) if input_size is not None else cfg.get("input_size", (3, 224, 224))[1:]
        overlay |= {"input_size": (channels, height, width), "test_input_size": None}
    if input_size is not None:
        overlay |= {"crop_pct": 1.0, "test_crop_pct": None, "crop_mode": "center", "pool_size": None}
    if channels != 3:
        overlay |= {name: (sum(cfg[name]) / len(cfg[name]),) * channels for name in ("mean", "std") if cfg.get(name)}
    arguments = {"num_classes": num_classes, "pretrained_cfg_overlay": overlay, **model_args}
    sized = {} if input_size is None or "img_size" in model_args else {"img_size": input_size}
    return describe(_create(architecture, arguments, sized))


def new_from_folder(folder: Path, name: str, *, num_classes: int, stored: StoredWeights | None = None) -> Loaded:
    """Build the model of a local timm folder with another number of classes and freshly drawn weights.

    Args:
        stored: weights that are taken over, but for the head, which alone is drawn then.

    Raises:
        UsageError: timm cannot build it.
        WeightsMismatchError: as of `load_folder`.
    """
    if stored is None:
        model = _create(f"local-dir:{folder}", {"num_classes": num_classes}, {}, name)
    else:
        model = load_folder(folder, stored, name).model
        with refusing(f"timm cannot give {name} a new head", "; choose another model"):
            model.reset_classifier(num_classes)
    given = getattr(model, "_model_args", {}) | {"num_classes": num_classes}
    model._model_args = read_json(folder / "config.json").get("model_args", {}) | given
    # the folder's labels are those of the weights that were not taken
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if not k.startswith("label_")}
    return describe(model)


def _create(source: str, arguments: dict[str, Any], sized: dict[str, int], name: str | None = None) -> Any:
    """Create a model of random weights; `sized` are arguments that are left out where the model does not take them."""
    state = torch.random.get_rng_state()
    try:
        model = timm.create_model(source, pretrained=False, **arguments, **sized)
        if not hasattr(model, "_model_args"):  # what timm notes since 1.0.31
            model._model_args = {k: v for k, v in (arguments | sized).items() if k != "pretrained_cfg_overlay"}
        return model
    except Exception as error:  # whatever an architecture raises where its arguments do not fit
        if sized and isinstance(error, TypeError) and "img_size" in str(error):
            torch.random.set_rng_state(state)
            return _create(source, arguments, {}, name)
        hidden = ("num_classes", "pretrained_cfg_overlay")
        shown = ", ".join(f"{k}={v}" for k, v in arguments.items() if k not in hidden)
        what = f"{name or source} with {shown}" if shown else name or source
        raise UsageError(f"timm cannot build {what} ({one_line(error, 120)}); mend the arguments") from error


def describe(model: Any, config: dict[str, Any] | None = None) -> Loaded:
    """Return what hfdetox needs to know of a timm model; `config` is its config.json where there is one."""
    num_labels = int(getattr(model, "num_classes", 0))
    named_labels = _labels(model.pretrained_cfg, num_labels)
    labels = tuple(text for _, text in named_labels) or label_names(num_labels)
    named = (config or {}).get("architecture") or model.pretrained_cfg.get("architecture")
    return TimmModel(model, TimmPreprocessing(timm_data_config(model)), labels, str(named or type(model).__name__),
                     aliases=tuple((name,) for name, _ in named_labels))  # fmt: skip


def labels_of(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and descriptions of the labels that a config.json gives its model, none where it gives none."""
    named = {key: config[key] for key in ("num_classes", "label_names", "label_descriptions") if key in config}
    cfg = {**(config.get("pretrained_cfg") or {}), **named}
    count = cfg.get("num_classes", 0)
    return _labels(cfg, count) or [(name, name) for name in label_names(count)]


def _labels(config: dict[str, Any], num_labels: int) -> list[tuple[str, str]]:
    """Return names and descriptions of a pretrained_cfg's labels; ImageNet's for its numbers of classes, else none."""
    names, descriptions = config.get("label_names"), config.get("label_descriptions") or {}
    if isinstance(names, dict):
        by_index = {int(index): name for index, name in names.items()}
        names = [by_index.get(index, str(index)) for index in range(num_labels)]
    if names is None:
        subset = timm.data.infer_imagenet_subset({"num_classes": num_labels})
        if subset is None:
            return []
        info = timm.data.ImageNetInfo(subset)
        names, descriptions = info.label_names(), info.label_descriptions(as_dict=True)
    if len(names) != num_labels:
        return []
    return [(str(name), str(descriptions.get(name, name))) for name in names]


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """Take out, in place, what does not fit native weights beside a config.json or stops transformers from loading."""
    for holder in (config, config.get("pretrained_cfg", {})):
        for key in _SOURCE_KEYS:
            holder.pop(key, None)
    # transformers 5.23 passes num_classes itself and stumbles over a second one; timm takes it from the root
    arguments = config.get("model_args", {})
    num_classes = arguments.pop("num_classes", None)
    if num_classes is not None:
        config.setdefault("num_classes", num_classes)
    if "model_args" in config and not arguments:
        del config["model_args"]
    return config


def _export_config(model: Any, loaded: Loaded) -> dict[str, Any]:
    """Let timm describe a model that came as an object."""
    from timm.models._hub import save_config_for_hf

    labels = {"label_names": list(loaded.labels)} if loaded.labels != label_names(len(loaded.labels)) else {}
    with tempfile.TemporaryDirectory() as scratch, refusing("timm cannot describe this model for saving"):
        path = Path(scratch) / "config.json"
        save_config_for_hf(model, path, model_config=labels, model_args=_arguments(model))
        return read_json(path)


def _arguments(model: Any) -> dict[str, Any] | None:
    """Return what a model is built again with, or None where timm's export knows it by itself (1.0.31 and newer)."""
    if hasattr(timm.models, "get_model_input_config"):
        return None
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    in_chans = timm_data_config(model)["input_size"][0]
    return getattr(model, "_model_args", {}) | {"in_chans": in_chans} | ({} if size is None else {"img_size": size})
