"""The pruning and tuning methods on models of both libraries: each runs and is saved, or says in a line why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hfdetox.defenses.anp import ANPConfig
from hfdetox.defenses.base import DefenseConfig
from hfdetox.defenses.bn import BNConfig
from hfdetox.defenses.bnp import BNPConfig
from hfdetox.defenses.clp import CLPConfig
from hfdetox.defenses.fp import FPConfig
from hfdetox.defenses.fst import FSTConfig
from hfdetox.defenses.ft import FTConfig
from hfdetox.defenses.ft_sam import FTSAMConfig
from hfdetox.defenses.nad import NADConfig
from hfdetox.defenses.rnp import RNPConfig
from hfdetox.errors import UsageError
from hfdetox.models.classifier import load_classifier
from hfdetox.training.engine import Engine
from tests.tiny_models import logits, make_folder, own_library
from tests.tiny_training import ToyImages, _quick_garbage, accelerator

__all__ = ["_quick_garbage", "accelerator"]

SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 8, "augmentation": "none"}
# masks on untrained weights: large steps and a budget that allows any loss, so that something is pruned
PRUNING: dict[str, Any] = {**SHORT, "learning_rate": 50.0, "budget": 0.99}
EVERYWHERE: list[DefenseConfig] = [
    FTConfig(**SHORT), FTSAMConfig(**SHORT), FSTConfig(**SHORT), NADConfig(**SHORT, teacher_epochs=1),
    FPConfig(**SHORT), ANPConfig(**PRUNING), RNPConfig(**PRUNING), CLPConfig(u=0.5),
]  # fmt: skip
STATISTICS: list[DefenseConfig] = [BNPConfig(u=0.5), BNConfig()]
RESNETS, OTHERS = ("transformers/resnet", "timm/resnet"), ("transformers/vit", "timm/vit", "timm/convnext")
CASES = [(config, kind) for kind in RESNETS + OTHERS for config in EVERYWHERE] + [
    (config, kind) for kind in RESNETS for config in STATISTICS
]


@pytest.mark.parametrize(("config", "kind"), CASES, ids=[f"{config.name}-{kind}" for config, kind in CASES])
def test_the_librarys_own_model_is_changed_and_saved(config: DefenseConfig, kind: str, accelerator: Accelerator,
                                                     tmp_path: Path) -> None:  # fmt: skip
    classifier = load_classifier(make_folder(tmp_path / "before", kind))
    source = ToyImages(40, side=32)
    assert source.images is not None
    names = list(classifier.model.state_dict())
    with torch.no_grad():
        old = classifier.network(source.images)
    Engine(accelerator, source, seed=1).run(classifier.network, config.phases(classifier.network))
    with torch.no_grad():
        expected = classifier.network(source.images)
    assert float((expected - old).abs().max()) > 1e-4
    assert torch.isfinite(expected).all()
    assert list(classifier.model.state_dict()) == names
    classifier.save(tmp_path / "after")
    with torch.no_grad():
        pictures = classifier.preprocessing.normalize(source.images)
    torch.testing.assert_close(logits(own_library(tmp_path / "after", kind), pictures), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("config", STATISTICS, ids=lambda config: config.name)
def test_statistics_are_refused_in_one_line_where_there_are_none(config: DefenseConfig, kind: str,
                                                                 tmp_path: Path) -> None:  # fmt: skip
    classifier = load_classifier(make_folder(tmp_path, kind))
    with pytest.raises(UsageError, match=f"^{config.name}: .*BatchNorm.*; use another defense") as said:
        config.phases(classifier.network)
    assert "\n" not in str(said.value)
