"""Every architecture of both libraries through the job: load, head, a few steps of D3, save, and load again.

    python -m tests.benchmarks.architectures OUT.jsonl [--only PATTERN] [--seconds 240]

writes one JSON line a case and skips what is there, so that it goes on where it was stopped; `--result` writes what
`tables.py` reads of them. Weights are random: tiny configurations of all image-classification types of
transformers, and the smallest variant of every module of timm at the smallest size that it takes. Each case is a
process of its own, so that one that crashes or hangs is a result.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from timm.models import save_for_hf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

import hfdetox
from hfdetox.defenses.auto import D3Config
from hfdetox.models.classifier import load_classifier
from hfdetox.models.layers import head_layers, norms_before_head
from hfdetox.models.network import library_logits
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from tests.benchmarks.tiny_configurations import OLDER, OTHERS, TINY, VARIANTS

CLASSES = 5
SIZES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 299, 384)
SECONDS = 240
# widths that are tried as the number of classes of one architecture, besides its own features
WIDTHS = 6


def cases() -> dict[str, Callable[[Path], None]]:
    """Return every case by its name: what writes its model into a folder."""
    found: dict[str, Callable[[Path], None]] = {}
    for kind, options in TINY.items():
        if kind not in CONFIG_MAPPING:
            continue  # newer than this transformers
        classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[CONFIG_MAPPING[kind]]
        for architecture in classes if isinstance(classes, tuple) else (classes,):
            name = f"transformers/{kind}"
            if isinstance(classes, tuple):
                name += f"/{architecture.__name__.rpartition('ImageClassification')[2] or 'plain'}"
            found[name] = lambda folder, kind=kind, options=options, architecture=architecture: write_transformers(
                folder, kind, options, architecture
            )
    for module in timm.list_modules():
        variant, arguments = VARIANTS[module] if timm.is_model(VARIANTS[module][0]) else OLDER[module]
        found[f"timm/{module}"] = lambda folder, name=variant, arguments=arguments: write_timm(folder, name, arguments)
    for variant in filter(timm.is_model, OTHERS):
        found[f"timm/{variant}"] = lambda folder, variant=variant: write_timm(folder, variant)
    return found


def write_transformers(folder: Path, kind: str, options: dict[str, Any], architecture: Any) -> None:
    """Write a tiny model of a type and its image processor as transformers does."""
    torch.manual_seed(0)
    if kind == "timm_wrapper":
        write_timm(folder / "timm", "test_resnet")
        # the wrapper stumbles over a second num_classes, which timm writes since 1.0.31
        config = json.loads((folder / "timm" / "config.json").read_text(encoding="utf-8"))
        config.get("model_args", {}).pop("num_classes", None)
        (folder / "timm" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for kept in (transformers.AutoModelForImageClassification, transformers.AutoImageProcessor):
            kept.from_pretrained(folder / "timm").save_pretrained(folder)
        return
    names = {index: f"class {index}" for index in range(CLASSES)}
    labels = {"num_labels": CLASSES, "id2label": names, "label2id": {name: i for i, name in names.items()}}
    config = CONFIG_MAPPING[kind](**options | labels)
    model = vary(architecture(config))
    model.save_pretrained(folder)
    side = 64 if kind in ("levit", "mobilevitv2") else 32
    kinds: Any = IMAGE_PROCESSOR_MAPPING.get(type(config), None) or {}
    if isinstance(kinds, tuple):  # transformers 5.0: the slow one and the fast one
        kinds = dict(zip(("pil", "torchvision"), kinds, strict=True))
    processor = (kinds.get("torchvision") or kinds.get("pil") or transformers.ViTImageProcessor)()
    square = {"height": side, "width": side}
    if hasattr(processor, "size"):
        processor.size = {"shortest_edge": side} if "shortest_edge" in (processor.size or {}) else square
    if getattr(processor, "do_center_crop", None) or "shortest_edge" in (processor.size or {}):
        processor.do_center_crop, processor.crop_size = True, square
    processor.save_pretrained(folder)


def write_timm(folder: Path, name: str, arguments: dict[str, Any] | None = None) -> None:
    """Write a variant with random weights, at the smallest of SIZES that it takes, as timm does."""
    for size in SIZES:
        model = try_timm(name, size, arguments or {})
        if model is not None:
            labels = {"label_names": [f"class {index}" for index in range(CLASSES)]}
            # what timm notes by itself since 1.0.31, and the wrapper of transformers needs
            sized = model.pretrained_cfg.get("fixed_input_size") and not hasattr(model, "_model_args")
            args = {"img_size": size} if sized else None
            try:
                save_for_hf(model, folder, model_config=labels, model_args=args, safe_serialization=True)
            except RuntimeError:  # CoaT shares tensors, which timm cannot write
                load_classifier(model, labels=labels["label_names"]).save(folder)
            return
    raise RuntimeError(f"{name} takes none of the sizes")


def try_timm(name: str, size: int, arguments: dict[str, Any]) -> Any:
    """Return a model that takes images of this size, or None."""
    given = {"num_classes": CLASSES, "pretrained_cfg_overlay": {"input_size": (3, size, size), "crop_pct": 1.0}}
    for sized in ({"img_size": size}, {}):
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, **given, **arguments, **sized)
            vary(model)(torch.randn(2, 3, size, size))
            model.train()(torch.randn(2, 3, size, size))
        except Exception:  # noqa: BLE001 (a wrong size shows in many ways)
            continue
        return model.eval()
    return None


@torch.no_grad()
def vary(model: nn.Module) -> Any:
    """Move what libraries start at 0 or 1, so that every weight matters; in eval mode."""
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def head_findings(model: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    """Return the head and the norms before it that are found, and whether the head is whole and nothing was changed."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads = head_layers(model)
    found = {"head": heads, "norms": norms_before_head(model)}
    found["restored"] = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return found | {"head_is_whole": head_is_whole(model, heads, images)}


@torch.no_grad()
def head_is_whole(model: nn.Module, heads: list[str], images: torch.Tensor) -> bool:
    """Tell whether the logits are 0 without the head's weights and biases."""
    own = [p for name in heads for p in model.get_submodule(name).parameters()]
    kept = [p.clone() for p in own]
    for parameter in own:
        parameter.zero_()
    logits = library_logits(model, images)
    for parameter, value in zip(own, kept, strict=True):
        parameter.copy_(value)
    return not logits.any()


def wrong_widths(model: nn.Module, config: Any, images: torch.Tensor) -> dict[str, Any]:
    """Return for which numbers of classes, equal to a hidden width, another head is found."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    widths = sorted({layer.weight.shape[0] for layer in layers} - {1, CLASSES})
    right = head_layers(model)
    if hasattr(model, "reset_classifier"):
        own = getattr(model, "num_features", 0)
        widths = sorted({own, *widths[:: max(1, len(widths) // WIDTHS)]} & set(widths))
    wrong = {}
    for width in widths:
        other = with_classes(model, config, width)
        found = head_layers(other)
        # a reset takes RepViT's and others' distilled head away
        if not set(found) <= set(right) or not head_is_whole(other, found, images):
            wrong[width] = found
    return {"widths": len(widths), "wrong_widths": wrong}


def with_classes(model: Any, config: Any, width: int) -> nn.Module:
    """Return the same architecture with another number of classes."""
    torch.manual_seed(0)
    if config is None:
        model.reset_classifier(width)
        return vary(model)
    other = type(config)(**{**config.to_diff_dict(), "id2label": {i: str(i) for i in range(width)}, "label2id": {}})
    return vary(type(model)(other))


class Noise:
    """Random uint8 images as an image source."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images: torch.Tensor | None = torch.randint(0, 256, (8, *size), generator=generator).to(torch.uint8)
        self.labels, self.positions = torch.arange(8) % CLASSES, torch.arange(8)

    def __len__(self) -> int:
        return 8

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.images is not None
        return self.positions[items], self.images[items], self.labels[items]


def run(write: Callable[[Path], None], folder: Path) -> Iterator[dict[str, Any]]:
    """Take one case through the job; yields what is known after each step."""
    write(folder / "before")
    yield {"step": "load"}
    begin = time.perf_counter()
    classifier = load_classifier(folder / "before")
    model, size = classifier.model, classifier.preprocessing.input_size
    yield {"load_seconds": round(time.perf_counter() - begin, 2), "input_size": list(size), "step": "head",
           "architecture": classifier.info.architecture, "parameters": classifier.info.parameters}  # fmt: skip
    inner = getattr(model, "timm_model", model)
    images = torch.randn(2, *size)
    yield head_findings(model, images) | {"step": "train"}
    source = Noise(size)
    config = D3Config(epochs=1, batch_size=4, learning_rate=1e-3, augmentation="none")
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    Engine(make_accelerator("cpu", "no"), source).run(classifier.network, config.phases(classifier.network))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    yield {"trained": bool(torch.isfinite(after).all() and (after != before).any()), "step": "save"}
    classifier.round_weights()
    classifier.save(folder / "after")
    pixels = classifier.preprocessing.normalize(source.images[:2])
    with torch.no_grad():
        expected = classifier.network(source.images[:2])
    yield {"step": "again"}
    found = again(classifier, folder / "after", pixels, expected)
    yield found | {"job_seconds": round(time.perf_counter() - begin, 1), "step": "pipeline"}
    yield piped(classifier, folder / "after") | {"step": "widths"}
    timm_like = hasattr(inner, "reset_classifier")
    yield wrong_widths(inner, None if timm_like else model.config, images) | {"step": "done"}


@torch.no_grad()
def again(classifier: Any, folder: Path, pixels: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    """Load what was saved in its own library, and a model of timm in transformers too; returns the differences,
    as shares of the largest logit."""
    found = {}
    if classifier.info.library == "timm":
        found["own"] = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pixels)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found["wrapper" if found else "own"] = library_logits(loaded, pixels)
    scale = expected.abs().max().clamp(min=1)
    return {name: float((logits - expected).abs().max() / scale) for name, logits in found.items()}


@torch.no_grad()
def piped(classifier: Any, folder: Path) -> dict[str, Any]:
    """Compare what `pipeline` says to a picture with hfdetox's own answer; returns the difference of probabilities."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    logits = classifier.network(classifier.preprocessing.prepare(picture)[None])
    answers = transformers.pipeline("image-classification", model=str(folder), device="cpu")(picture, top_k=CLASSES)
    scores = {answer["label"]: answer["score"] for answer in answers}
    wanted = dict(zip(classifier.labels, logits.softmax(1)[0].tolist(), strict=True))
    # transformers numbers the labels of a model of timm
    if not scores.keys() <= wanted.keys():
        wanted = {f"LABEL_{index}": value for index, value in enumerate(wanted.values())}
    return {"pipeline": max(abs(scores[label] - wanted[label]) for label in scores)}


def in_child(write: Callable[[Path], None], pipe: Any) -> None:
    """Run one case and send what is found, step by step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for found in run(write, Path(scratch)):
                pipe.send(found)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is the case's result)
            said = " ".join(str(error).split()).replace(f"{scratch}/before", "it")
            pipe.send({"error": f"{type(error).__name__}: {said[:300]}"})
        pipe.send({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})


def measured(name: str, write: Callable[[Path], None]) -> dict[str, Any]:
    """Run one case in a process of its own and return its line."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    begin = time.perf_counter()
    child = context.Process(target=in_child, args=(write, sender))
    child.start()
    sender.close()
    found: dict[str, Any] = {"case": name, "step": "write"}
    try:
        while receiver.poll(max(0.0, begin + SECONDS - time.perf_counter())):
            found |= receiver.recv()
        found["error"] = f"more than {SECONDS} s"
    except EOFError:
        child.join()
        if child.exitcode:
            found["error"] = f"the process ended with {child.exitcode}"
    child.kill()
    return found | {"seconds": round(time.perf_counter() - begin, 1)}


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines that are there, by case; the last of each counts."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["case"]: line for line in lines}


def in_order(line: dict[str, Any]) -> bool:
    """Tell whether a case went through, and every number of it is as it should be."""
    differences = [line.get(name, 0.0) for name in ("own", "wrapper", "pipeline")]
    return line["step"] == "done" and "error" not in line and max(differences) < 1e-3 and bool(
        line["head_is_whole"] and line["trained"] and line["restored"] and not line["wrong_widths"])  # fmt: skip


def write_result(lines: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the lines of all cases as a result of the benchmarks, a line each."""
    kept = ("case", "architecture", "parameters", "input_size", "head", "norms", "own", "wrapper", "pipeline", "widths",
            "wrong_widths", "load_seconds", "job_seconds", "peak_mib", "error")  # fmt: skip
    rows = []
    for name in cases():
        line = {key: lines[name][key] for key in kept if key in lines[name]} | {"in_order": in_order(lines[name])}
        line |= {key: float(f"{line[key]:.1g}") for key in ("own", "wrapper", "pipeline") if key in line}
        rows.append(json.dumps(line))
    versions = f"timm {timm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    head = {
        "command": "python -m tests.benchmarks.architectures OUT.jsonl",
        "hfdetox_version": hfdetox.__version__,
        "versions": versions,
    }
    body = ",\n  ".join(rows)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n  {body}\n]}}\n', encoding="utf-8")


def main() -> None:
    """Run the cases that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", default="*", help="a shell pattern of cases")
    parser.add_argument("--again", action="store_true", help="also those that are there and not in order")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--result", type=Path, help="run nothing; write the lines that are there to this file")
    options = parser.parse_args()
    if options.result:
        write_result(read_lines(options.output), options.result)
        return
    begin, there = time.perf_counter(), read_lines(options.output)
    for name, write in cases().items():
        due = name not in there or (options.again and not in_order(there[name]))
        if time.perf_counter() - begin > options.seconds or not due or not fnmatch.fnmatchcase(name, options.only):
            continue
        line = measured(name, write)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(name, "in order" if in_order(line) else line, flush=True)


if __name__ == "__main__":
    main()
