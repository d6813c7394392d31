"""Weight files: which ones a folder has, in which dtypes they are stored, and rounding to those dtypes."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hfdetox import documents
from hfdetox.errors import RunError, UsageError, one_line
from hfdetox.files import check_safetensors, sha256_file
from hfdetox.hub.download import ADAPTER, no_weights

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# tensors that a message names, and letters of all of a kind
_SHOWN_KEYS, _SHOWN = 5, 110
# how much larger a network may become than its weights before it is no network of theirs: a factor, and as many more
_FACTOR, _MORE = 4, 2**24
# what stands in checkpoints that are not a model's own, by how the names begin
_ADVICE = {
    "loss": "it holds a tensor of the training's loss: save the model without it",
    "criterion": "it holds a tensor of the training's loss: save the model without it",
    "_orig_mod.": "torch.compile put _orig_mod. before the names: save the model inside (`model._orig_mod`)",
    "module.": "DataParallel put module. before the names: save the model inside (`model.module`)",
    "model.": "a wrapper put model. before the names: save the model inside",
}


class WeightsMismatchError(UsageError):
    """The weight file does not hold exactly the tensors of the model that the config describes."""


@dataclass(frozen=True)
class StoredWeights:
    """The weight files of a folder; `dtypes` has the floating-point tensors by their names in the files, `numbers` how
    many numbers these hold."""

    files: tuple[Path, ...]
    dtypes: dict[str, torch.dtype]
    dominant: torch.dtype
    sha256: str
    numbers: int

    def load(self) -> dict[str, torch.Tensor]:
        """Read every tensor, on the CPU, as stored."""
        return {name: tensor for file in self.files for name, tensor in load_file(file).items()}


def find_weights(folder: Path, known: Mapping[str, str] | None = None) -> StoredWeights:
    """Read the headers of a folder's safetensors files; `known` has the SHA-256 of files that were hashed already.

    Raises:
        PickleOnlyError: there are only pickle files.
        UsageError: there are none, a header is not one, or a tensor is quantized.
    """
    files = weight_files(folder)
    counts: Counter[torch.dtype] = Counter()
    dtypes = {}
    for file in files:
        for name, entry in check_safetensors(file).items():
            if name == "__metadata__" or entry["dtype"].startswith(("I", "U", "BOOL")):
                continue
            if entry["dtype"] not in _DTYPES:
                raise UsageError(f"{file.name}: tensor {name} is stored as {entry['dtype']}; hfdetox handles "
                                 "unquantized float64, float32, float16 and bfloat16 weights")  # fmt: skip
            dtypes[name] = _DTYPES[entry["dtype"]]
            counts[dtypes[name]] += int(torch.Size(entry["shape"]).numel())
    dominant = counts.most_common(1)[0][0] if counts else torch.float32
    sha256 = {file.name: (known or {}).get(file.name) or sha256_file(file) for file in files}
    return StoredWeights(files, dtypes, dominant, digest(sha256), counts.total())


@contextlib.contextmanager
def no_larger_than(numbers: int, name: str) -> Iterator[None]:
    """Stop a network that is built inside from growing far beyond its weights, before its memory is filled.

    Raises:
        UsageError: its configuration describes a much larger one.
    """
    sizes: dict[tuple[int, str], int] = {}
    total = 0

    def grown(module: nn.Module, key: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        size = 0 if parameter is None else parameter.numel()
        # a parameter may be put in its place again
        total += size - sizes.get((id(module), key), 0)
        sizes[id(module), key] = size
        if total > _FACTOR * numbers + _MORE:
            raise UsageError(f"the config.json of {name} describes a network of more than {total:,} parameters, and "
                             f"its weights have {numbers:,}; mend it")  # fmt: skip

    hook = register_module_parameter_registration_hook(grown)
    try:
        yield
    finally:
        hook.remove()


def weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / WEIGHTS_NAME).is_file():
        return (folder / WEIGHTS_NAME,)
    if (folder / INDEX_NAME).is_file():
        shards = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise UsageError(f"{folder / INDEX_NAME} has no weight_map from tensors to files; download the model anew")
        # a name with a folder in it could point outside the snapshot whose hashes were checked
        files = tuple(folder / Path(name).name for name in sorted(set(shards.values())))
        if missing := [file.name for file in files if not file.is_file()]:
            raise UsageError(f"{folder} lacks {', '.join(missing)}, which {INDEX_NAME} names; download the whole model")
        return files
    others, config = sorted(folder.glob("*.safetensors")), folder / "config.json"
    # of timm alone; transformers looks for its own name
    if len(others) == 1 and config.is_file() and "model_type" not in read_json(config):
        return (others[0],)
    there = [*folder.iterdir(), *folder.glob("*/*.safetensors")]
    names = [file.relative_to(folder).as_posix() for file in there if file.is_file()]
    raise no_weights(str(folder), names, lambda: folder / ADAPTER)


def saved_dtypes(model: nn.Module, stored: StoredWeights | None) -> dict[str, torch.dtype]:
    """Return the dtype in which each floating-point entry of a freshly loaded model's state dict is saved.

    Without files that it was read from, its own. transformers holds some tensors under other names than the files do;
    those are told by their values, and what is left (split or joined tensors) takes the dominant dtype.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if stored is None:
        return {name: tensor.dtype for name, tensor in state.items()}
    unnamed = state.keys() - stored.dtypes.keys()
    files = stored.load() if unnamed and len(set(stored.dtypes.values())) > 1 else {}
    return {
        name: _dtype_by_value(tensor, files, stored) if name in unnamed else stored.dtypes[name]
        for name, tensor in state.items()
    }


def _dtype_by_value(tensor: torch.Tensor, files: Mapping[str, torch.Tensor], stored: StoredWeights) -> torch.dtype:
    found = {
        stored.dtypes[name]
        for name, candidate in files.items()
        if name in stored.dtypes and candidate.shape == tensor.shape and torch.equal(candidate.to(tensor), tensor)
    }
    # all zeros in two dtypes: the wider one loses nothing
    return max(found, key=lambda dtype: dtype.itemsize) if found else stored.dominant


def dominant_dtype(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """Return the dtype that holds most values of the state dict; float32 for a model without any."""
    counts: Counter[torch.dtype] = Counter()
    for name, tensor in model.state_dict().items():
        if name in dtypes:
            counts[dtypes[name]] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


@torch.no_grad()
def round_in_place(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round each tensor to its dtype, keeping float32 storage; raises RunError when a value does not fit."""
    for name, tensor in model.state_dict().items():
        if dtypes.get(name, tensor.dtype) != tensor.dtype:
            tensor.copy_(_rounded(name, tensor, dtypes[name]))


def stored_state(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Return copies of the state dict on the CPU in the dtypes to be saved, each with its own contiguous storage.

    Raises RunError when a value does not fit its dtype.
    """
    return {
        name: _rounded(name, tensor, dtypes.get(name, tensor.dtype)).to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }


def _rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = tensor.detach().to(dtype)
    if dtype == torch.float16 and not torch.isfinite(rounded).all() and torch.isfinite(tensor).all():
        raise RunError(f"{name} has values that {dtype_name(dtype)}, the source's dtype, cannot hold; use a weaker "
                       "setting, or convert the source to float32 first")  # fmt: skip
    return rounded


def check_same_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise WeightsMismatchError naming tensors that are missing, unexpected or of another shape."""
    shapes = [(name, found[name].shape, tensor.shape) for name, tensor in expected.items() if name in found]
    raise_for_keys(where, expected.keys() - found.keys(), found.keys() - expected.keys(), shapes)


def raise_for_keys(where: str, missing: Iterable[str], unexpected: Iterable[str],
                   shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:  # fmt: skip
    """Raise WeightsMismatchError for names or (name, found, wanted) shapes that do not fit, naming the first few."""
    mismatched = [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in shapes
                  if tuple(found) != tuple(wanted)]  # fmt: skip
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": sorted(mismatched)}
    if parts := [f"{kind}: {_shorten(names)}" for kind, names in kinds.items() if names]:
        advice = next((text for start, text in _ADVICE.items() if any(name.startswith(start) for name in unexpected)),
                      "hfdetox loads complete checkpoints only")  # fmt: skip
        raise WeightsMismatchError(f"the weights of {where} do not fit its config.json ({'; '.join(parts)}); {advice}")


def _shorten(names: list[str]) -> str:
    """Return the first names, at least one, as many as fit into a line."""
    shown = [one_line(name, _SHOWN // 2) for name in names[:_SHOWN_KEYS]]
    while len(shown) > 1 and len(", ".join(shown)) > _SHOWN:
        shown.pop()
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def digest(sha256: Mapping[str, str]) -> str:
    """Return one SHA-256 for weight files by name: a single file's own, or that of the sorted "name sha" lines."""
    if len(sha256) == 1:
        return next(iter(sha256.values()))
    lines = "".join(f"{name} {value}\n" for name, value in sorted(sha256.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; UsageError when the file is missing or not one."""
    if not path.exists():
        raise UsageError(f"{path.parent} has no {path.name}; give the folder or id of an image classifier")
    return documents.read_json(path, dict[str, Any], "a JSON object")
