"""`d3:auto`: what is reconstructed is unlearnt, and where nothing speaks for a backdoor the weights are pushed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses import _unlearning, parse_defense
from hfdetox.defenses._by_evidence import unlearning_of
from hfdetox.defenses.auto import D3Config
from hfdetox.errors import UsageError
from hfdetox.models.network import Network
from hfdetox.training.engine import Engine
from tests.defenses.pixels import pixel_convnet
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, run
from tests.tiny_training import CLASSES, ToyImages, _quick_garbage, accelerator, mlp, toy_preprocessing

__all__ = ["_quick_garbage", "accelerator"]

UNLEARN = ["unlearn-look", "unlearn-search"]
SMALL: dict[str, Any] = {"epochs": 2, "min_steps": 0, "batch_size": 24, "augmentation": "none"}


def auto(**settings: Any) -> D3Config:
    """Return the preset with few steps for toy images."""
    return D3Config(**{**D3Config.presets["auto"], **SMALL, **settings})


@pytest.fixture(params=[True, False], ids=["evident", "not evident"])
def evident(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Make any score, or none, speak for a backdoor, and the searches short."""
    found = bool(request.param)
    own = unlearning_of

    def short(config: Any, features: Any) -> Any:
        return replace(own(config, features), blend_steps=3, patch_steps=3)

    monkeypatch.setattr("hfdetox.defenses._by_evidence.unlearning_of", short)
    monkeypatch.setattr(_unlearning, "_SURE", -100.0)
    monkeypatch.setattr(_unlearning, "_PROBED", -100.0 if found else 100.0)
    monkeypatch.setattr(_unlearning, "_PROBED_CLASSES", 2)
    monkeypatch.setattr(_unlearning, "_LED", 2.0)
    monkeypatch.setattr(_unlearning, "_HARDLY", 0.0)
    return found


def trained(record: Any) -> list[str]:
    return [entry["phase"] for entry in record.history]


def plain_network() -> Network:
    """Return a network without BatchNorm."""
    body = mlp().model
    assert isinstance(body, nn.Module)
    return Network(body, toy_preprocessing()).eval()


def test_one_of_the_two_ways_is_taken_and_said(evident: bool, accelerator: Accelerator) -> None:
    network = pixel_convnet()
    head = network.get_parameter("model.7.weight").detach().clone()
    config = auto()
    record = run(config, network, accelerator)  # type: ignore[arg-type]
    assert trained(record) == UNLEARN + (["unlearn"] * 2 if evident else ["d3-look", "d3", "d3"])
    now = network.get_parameter("model.7.weight").detach()
    cosine = float(torch.nn.functional.cosine_similarity(head.flatten(), now.flatten(), dim=0))
    assert (cosine > 0.9) == evident, "only the push starts the head anew"
    said = config.choices(record.history)
    if evident:
        assert said[0].startswith("Something speaks for a backdoor")
        assert not any("λ" in sentence or sentence.startswith("Selected") for sentence in said)
    else:
        assert said[0].startswith("Nothing that was reconstructed speaks for a backdoor, which does not mean")
        assert "unlearnt gently" not in " ".join(said)
        assert any(sentence.startswith("Selected: head") for sentence in said)
    assert said[1].startswith("Taken as possible targets: class ")


def test_the_old_preset_is_the_push_alone(accelerator: Accelerator) -> None:
    config, preset = parse_defense("d3:auto-1", {"epochs": "1", "batch_size": "24"})
    assert (preset, config.settings()["reconstruct"]) == ("auto-1", False)
    record = run(config, pixel_convnet(), accelerator)  # type: ignore[arg-type]
    assert trained(record) == ["d3-look", "d3"]
    assert not config.settings()["distillation"]
    assert not config.settings()["gratings"]
    assert parse_defense("d3:auto")[0] == replace(D3Config(**D3Config.presets["auto-1"]), reconstruct=True,
                                                  distillation=1.0, gratings=0.1)  # fmt: skip


@pytest.mark.parametrize("make", [pixel_convnet, plain_network])
def test_seeds_and_state(make: Any, evident: bool, accelerator: Accelerator, tmp_path: Path) -> None:
    assert_repeatable_and_tidy(auto(), make, accelerator)
    assert_resumes(auto(), make, accelerator, tmp_path, 4 if evident else 5)


class Squared(nn.Module):
    """A head that is not linear: something follows its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.body(x).square()


class Narrow(nn.Module):
    """A last layer of fewer outputs than there are classes, which a matrix follows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES - 1))
        self.last = nn.Parameter(torch.randn(CLASSES - 1, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) @ self.last


@pytest.mark.parametrize("make", [Squared, Narrow])
def test_a_head_that_is_not_linear_is_pushed_as_ever(make: type[nn.Module], accelerator: Accelerator) -> None:
    torch.manual_seed(0)
    config = auto(layers=("body.1",))
    record = run(config, Network(make(), toy_preprocessing()).eval(), accelerator)  # type: ignore[arg-type]
    assert trained(record) == ["unlearn-look", "d3-look", "d3", "d3"]
    assert config.choices(record.history)[0] == (
        "The weights were pushed: no class can be accused, for the model's head is not linear."
    )
    # the defense of that name has nothing else to do
    with pytest.raises(UsageError, match="name the classes that may be a target"):
        run(parse_defense("unlearn", {"epochs": "1"})[0], Network(make(), toy_preprocessing()).eval(), accelerator)  # type: ignore[arg-type]


def test_images_that_are_no_grey_levels_are_pushed_as_ever(accelerator: Accelerator) -> None:
    network, config = pixel_convnet(), auto()
    network.normalizes = False
    assert [stage.name for stage in config.phases(network)] == ["d3-look", "d3"]
    source = ToyImages()
    source.images = source.images / 255  # type: ignore[operator]
    record = Engine(accelerator, source).run(network, config.phases(network))
    assert trained(record) == ["d3-look", "d3", "d3"]
    assert "no trigger can be searched, for the model's images are no grey levels" in config.choices(record.history)[0]


def test_the_unlearning_has_its_own_settings_within_those_of_the_run() -> None:
    default = unlearning_of(D3Config(**D3Config.presets["auto"]), "auto")
    assert default == parse_defense("unlearn")[0]
    short = unlearning_of(auto(epochs=2, batch_size=8, max_grad_norm=1.0, gradient_accumulation_steps=2), "sgd")
    assert (short.epochs, short.min_steps, short.batch_size, short.optimizer) == (2, 0, 8, "sgd")
    assert (short.max_grad_norm, short.gradient_accumulation_steps, short.augmentation) == (1.0, 2, "none")
    assert unlearning_of(auto(augmentation="crop"), "auto").augmentation == "none", "no flips were asked for"
    assert unlearning_of(auto(augmentation="auto"), "auto").augmentation == "flip"


def test_a_card_says_that_there_are_two_ways() -> None:
    said = auto().describe("70 trusted images")
    assert "looked for on 70 trusted images" in said
    assert "[arXiv 2411.09585](https://arxiv.org/abs/2411.09585)" in said
    assert "which of the two this run did" in said
    assert "looked for" not in D3Config(**D3Config.presets["auto-1"]).describe("70 trusted images")


def test_weights_of_images_need_the_push_alone() -> None:
    with pytest.raises(UsageError, match="searches triggers; take the preset auto-1, or leave reweight out"):
        parse_defense("d3:auto", {"reweight": "class"})
    parse_defense("d3:auto-1", {"reweight": "class"})
