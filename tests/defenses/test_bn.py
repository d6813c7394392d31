"""BN re-estimation: the statistics by hand, over uneven batches, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hfdetox.defenses import parse_defense
from hfdetox.defenses.bn import BNConfig
from hfdetox.errors import UsageError
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, one_batch, run
from tests.tiny_training import Scaled, _quick_garbage, accelerator, convnet, mlp, weights_of

__all__ = ["_quick_garbage", "accelerator"]


def strange() -> Scaled:
    """Return a network with dropout whose statistics are far from those of any image."""
    network = convnet(dropout=0.5)
    network.model[1].running_mean.fill_(50.0)  # type: ignore[index, union-attr, operator]
    network.model[1].running_var.fill_(9.0)  # type: ignore[index, union-attr, operator]
    return network


@pytest.mark.parametrize(
    ("count", "size", "parts"),
    [
        (45, 64, [45]),
        (45, 32, [32, 13]),
        (33, 16, [16, 16]),  # the last image alone is left out
    ],
)
def test_statistics_by_hand(count: int, size: int, parts: list[int], accelerator: Accelerator) -> None:
    network = strange()
    before = weights_of(network)
    record = run(BNConfig(batch_size=size), network, accelerator, count)
    features = network.model[0](one_batch(count).images.float() / 127.5 - 1).detach()  # type: ignore[index, operator]
    seen = features[: sum(parts)].split(parts)
    # images in their order; each batch weighs as many as it has, its variance is the unbiased one
    shares = [part / sum(parts) for part in parts]
    mean = sum(share * part.mean((0, 2, 3)) for share, part in zip(shares, seen, strict=True))
    variance = sum(share * part.transpose(0, 1).flatten(1).var(1) for share, part in zip(shares, seen, strict=True))
    after = weights_of(network)
    torch.testing.assert_close(after["model.1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["model.1.running_var"], variance, rtol=1e-4, atol=1e-5)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert [(row["phase"], row["images"]) for row in record.history] == [("bn", sum(parts))]
    assert network.model[1].momentum == 0.1  # type: ignore[index, union-attr]


def test_a_network_without_batchnorm_is_refused() -> None:
    with pytest.raises(UsageError, match="bn: Sequential has no BatchNorm with running statistics"):
        BNConfig().phases(mlp())  # type: ignore[arg-type]


def test_repeatable_and_tidy(accelerator: Accelerator) -> None:
    assert_repeatable_and_tidy(BNConfig(batch_size=16), strange, accelerator)


def test_resumes(accelerator: Accelerator, tmp_path: Path) -> None:
    assert_resumes(BNConfig(batch_size=16), strange, accelerator, tmp_path, saves=1)


def test_it_is_in_the_list() -> None:
    assert parse_defense("bn") == (BNConfig(), "control")
    with pytest.raises(UsageError, match="bn: batch_size must be at least 2, got 1"):
        BNConfig(batch_size=1)
