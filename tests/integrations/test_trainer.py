"""D3 in a Trainer as people use one: what works as they expect, and one line for what cannot.

That it equals the engine, resumes bit for bit and knows skipped steps is tested with its example (test_examples.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from timm import create_model
from torch import nn
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hfdetox import D3, D3Config, UsageError
from hfdetox.integrations import D3Callback, D3Trainer
from tests import tiny_models

COUNT = len(tiny_models.NAMES)
IMAGES = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, COUNT, (24,), generator=torch.Generator().manual_seed(1))
CONFIG = D3Config(learning_rate=0.03)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Trainer leaves Accelerate's shared state behind."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def items(image: str = "pixel_values", label: str = "labels") -> list[dict[str, Any]]:
    return [{image: x, label: y} for x, y in zip(IMAGES, LABELS, strict=True)]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    usual = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "max_grad_norm": 0, "use_cpu": True,
             "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}  # fmt: skip
    return TrainingArguments(str(folder), **{**usual, **more})


def vit(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_models.transformers_model("vit").to(dtype)


def train(
    folder: Path,
    model: nn.Module,
    config: D3Config = CONFIG,
    images: Any = None,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> D3Trainer:
    d3 = D3(model, config)
    trainer = D3Trainer(model, arguments(folder, **more), d3=d3, train_dataset=images or items(), **options or {})
    trainer.train()
    return trainer


def check(d3: D3, *, rtol: float = 1e-5) -> None:
    """Every selected weight is on its sphere, and not where it was."""
    for name, weight in d3.weights.items():
        torch.testing.assert_close(weight.detach().norm(), d3.initial[name].norm(), rtol=rtol, atol=0)
        assert (weight.detach() - d3.initial[name]).norm() > 0.1 * d3.initial[name].norm()


@pytest.mark.parametrize(
    "more",
    [
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_trainer_offers_works(tmp_path: Path, more: dict[str, Any]) -> None:
    check(train(tmp_path, vit(), D3Config(learning_rate=0.03, layers=("head", "*.projection")), **more).d3)


@pytest.mark.parametrize(
    ("images", "more"),
    [
        (items(label="label"), {}),
        (items(label="fine_label"), {"label_names": ["fine_label"]}),
        (Dataset.from_dict({"pixel_values": IMAGES.numpy(), "label": LABELS.numpy(), "name": ["x"] * 24}), {}),
    ],
    ids=["label", "another name", "datasets"],
)
def test_labels_may_be_called_otherwise(tmp_path: Path, images: Any, more: dict[str, Any]) -> None:
    images = images.with_format("torch") if isinstance(images, Dataset) else images
    usual, other = train(tmp_path, vit()), train(tmp_path, vit(), images=images, **more)
    assert torch.equal(usual.model.classifier.weight, other.model.classifier.weight)


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_metrics_are_computed_and_the_best_model_is_what_is_left(tmp_path: Path, kind: str) -> None:
    model, seen = tiny_models.transformers_model(kind), []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found.predictions.shape)
        assert (found.label_ids == LABELS.numpy()).all()
        return {"first": float(len(seen) == 1)}  # the first epoch's is the best

    trainer = train(tmp_path, model, options={"eval_dataset": items(), "compute_metrics": metrics},
                    eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
                    metric_for_best_model="first")  # fmt: skip
    assert seen == [(24, COUNT)] * 3
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    best = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    last = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-9").state_dict()
    assert not torch.equal(best["classifier.weight"], last["classifier.weight"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, best[name]), name
    check(trainer.d3)


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("work", "line"),
    [
        (lambda at: train(at, vit(torch.bfloat16)), "the weights of classifier are bfloat16, too coarse"),
        (lambda at: train(at, vit(), label_smoothing_factor=0.1), "leave label_smoothing_factor and"),
        (lambda at: train(at, vit(), options={"compute_loss_func": max}), "and compute_loss_func out"),
        (lambda at: train(at, create_model("test_resnet", num_classes=COUNT)), "pixel_values, which ResNet does not"),
        (lambda at: train(at, vit(), images=items("image")), "a batch has no pixel_values (it has labels; "),
        (lambda at: train(at, vit(), images=items(label="y")), "no labels (it has pixel_values; Trainer drops"),
        (lambda at: D3Trainer(vit(), arguments(at), d3=D3(vit(), CONFIG), train_dataset=items()).train(),
         "the weights of classifier are not what this Trainer trains"),
        (lambda at: D3Trainer(args=arguments(at), model_init=vit, d3=D3(vit(), CONFIG), train_dataset=items()).train(),
         "without model_init"),
    ],
    ids=["bf16 weights", "smoothing", "loss", "timm", "no images", "no labels", "another model", "model_init"],
)  # fmt: skip
def test_what_cannot_be_is_one_line(tmp_path: Path, work: Callable[[Path], object], line: str) -> None:
    assert line in refused(lambda: work(tmp_path))


class Own(Trainer):
    """What a person writes who has a Trainer already."""

    d3: D3

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        return self.d3.loss(model(pixel_values=inputs["pixel_values"]).logits, inputs["labels"])


def own(folder: Path, model: nn.Module) -> Own:
    d3 = D3(model, CONFIG)
    trainer = Own(model, arguments(folder, save_strategy="epoch"), callbacks=[D3Callback(d3)], train_dataset=items())
    trainer.d3 = d3
    return trainer


def test_with_the_callback_alone_a_run_is_resumed_from_where_d3_started(tmp_path: Path) -> None:
    whole = own(tmp_path, tiny_models.transformers_model("convnext"))
    whole.train()
    other = tiny_models.transformers_model("convnext")
    with torch.no_grad():
        other.classifier.weight.mul_(3)
    resumed = own(tmp_path, other)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(resumed.d3.initial["classifier"], whole.d3.initial["classifier"])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_callback_alone_keeps_the_scales_before_the_head(tmp_path: Path) -> None:
    model = vit()
    before = model.vit.layernorm.weight.clone()
    own(tmp_path, model).train()
    assert torch.equal(model.vit.layernorm.weight, before)


def ready(folder: Path, model: nn.Module) -> D3Trainer:
    options = arguments(folder, save_strategy="epoch", num_train_epochs=2)
    return D3Trainer(model, options, d3=D3(model, CONFIG), train_dataset=items())


@pytest.mark.parametrize("make", [own, ready])
def test_a_checkpoint_without_d3s_own_state_is_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path, vit()).train()
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "d3.safetensors").unlink()
    said = refused(lambda: make(tmp_path, vit()).train(resume_from_checkpoint=str(checkpoint)))
    assert f"{checkpoint} has no d3.safetensors" in said
