"""i-BAU: the fixed point in closed form, the hypergradient against finite differences, rounds, and what stays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from hfdetox.defenses import parse_defense
from hfdetox.defenses.i_bau import IBAUConfig, Universal, fixed_point
from hfdetox.errors import UsageError
from hfdetox.models.network import Network
from hfdetox.training.batches import Batch
from tests.defenses.pixels import linear, pixel_convnet, pixels
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, run
from tests.tiny_training import CLASSES, _quick_garbage, accelerator, toy_preprocessing, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL = IBAUConfig(epochs=2, batch_size=24)


@pytest.mark.parametrize(("terms", "expected"), [(1, [1, 0]), (2, [1.5, 0.25]), (3, [1.75, 0.5]), (60, [2, 1])])
def test_the_fixed_point_of_a_linear_map(terms: int, expected: list[float]) -> None:
    """Φ(δ) = A δ, A = (1/2 1/4; 0 1/2), g = (1, 0): g + Aᵀg = (1.5, 0.25), then (1.75, 0.5); (I − Aᵀ)⁻¹ g = (2, 1)."""
    at = torch.tensor([3.0, -1.0], requires_grad=True)
    mapped = torch.tensor([[0.5, 0.25], [0.0, 0.5]]) @ at
    v = fixed_point(mapped, at, torch.tensor([1.0, 0.0]), terms)
    assert v.tolist() == pytest.approx(expected, rel=1e-5)


def plain_objective(weight: torch.Tensor, delta: torch.Tensor, x: torch.Tensor, labels: torch.Tensor,
                    v: torch.Tensor | None, terms: int) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return H + ⟨Φ, v⟩ and v of a linear model, with derivatives by formula; v is found where it is not given.

    ce has the slope Wᵀ mean(p − y) by δ and the curvature Wᵀ mean(diag p − p pᵀ) W.
    """
    p = torch.softmax((x + delta) @ weight.T, 1)
    target = nn.functional.one_hot(labels, 2).double()
    slope = weight.T @ (p - target).mean(0)
    mapped = delta - 0.1 * (0.002 * delta - slope)
    if v is None:
        curvature = weight.T @ (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0) @ weight
        jacobian = torch.eye(2, dtype=torch.float64) - 0.1 * (0.002 * torch.eye(2, dtype=torch.float64) - curvature)
        v = torch.zeros(2, dtype=torch.float64)
        for _ in range(terms):
            v = jacobian.T @ v + slope
    outer = -(target * p.log()).sum(1).mean()
    return outer + mapped @ v, v


@pytest.mark.parametrize("terms", [1, 5])
def test_the_hypergradient_against_finite_differences(terms: int) -> None:
    rows, delta = ((0.2, 0.7), (0.9, 0.1), (0.5, 0.4)), torch.tensor([0.3, -0.2])
    labels = torch.tensor([0, 1, 0])
    network = linear([[1.0, -0.5], [0.25, 0.75]])
    universal = Universal(network, IBAUConfig(share=1.0, terms=terms))
    with torch.no_grad():
        universal.perturbation.copy_(delta.view(1, 1, 1, 2))
    images = pixels(*rows)
    batch = Batch(images, labels, torch.full((3,), 1 / 3))
    found = universal(batch, batch)
    layer = network.model[1]  # type: ignore[index]
    (gradient,) = torch.autograd.grad(found["loss"], layer.weight)

    weight, x, at = layer.weight.detach().double(), torch.tensor(rows).double(), delta.double()
    _, v = plain_objective(weight, at, x, labels, None, terms)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = weight.clone()
            moved[place] += step
            ends.append(plain_objective(moved, at, x, labels, v, terms)[0])
        expected[place] = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
    # the value is H alone
    p = torch.softmax((x + at) @ weight.T, 1)
    assert found["loss"].item() == pytest.approx(float(-p[torch.arange(3), labels].log().mean()), rel=1e-5)


def test_the_search_by_hand() -> None:
    """W = ln 3 · I and x = (1, 0): p = (3/4, 1/4), and the model says 0, whatever the label.

    The loss −ce + 0.001 ‖δ‖² has the slope −Wᵀ (p − y) = ln 3 · (1/4, −1/4) at δ = 0.
    """
    universal = Universal(linear([[math.log(3), 0.0], [0.0, math.log(3)]]), IBAUConfig())
    terms = universal(Batch(pixels((1.0, 0.0)), torch.tensor([1]), torch.ones(1)))
    terms["loss"].backward()
    assert universal.perturbation.grad is not None
    assert universal.perturbation.grad.flatten().tolist() == pytest.approx([0.274653, -0.274653], rel=1e-5)
    assert terms["cross_entropy"].item() == pytest.approx(math.log(4 / 3), rel=1e-5)


def test_the_perturbation_lives_in_the_normalised_space() -> None:
    # deviation 0.5 and scale 1/255: one unit is 127.5 grey levels
    assert Universal(pixel_convnet(), SMALL).unit.flatten().tolist() == pytest.approx([127.5] * 3)


def test_one_image_in_a_hundred_carries_it() -> None:
    network = linear([[1.0, 0.0], [0.0, 1.0]])
    seen: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    universal = Universal(network, IBAUConfig())
    with torch.no_grad():
        universal.perturbation.fill_(0.5)
    for count, carrying in ((256, 2), (20, 1)):
        seen.clear()
        images, labels = torch.zeros(count, 1, 1, 2), torch.zeros(count, dtype=torch.int64)
        batch = Batch(images, labels, torch.full((count,), 1 / count))
        universal(batch, batch)
        assert int((seen[0] != 0).flatten(1).all(1).sum()) == carrying
        # one unit is 1 / float32(1 / 255), which is 254.99998 and not 255
        assert seen[1].unique().tolist() == pytest.approx([127.5], rel=1e-6)


def test_a_round_is_a_search_from_zero_and_an_unlearning(accelerator: Accelerator) -> None:
    network = pixel_convnet()
    before = weights_of(network)
    record = run(SMALL, network, accelerator)  # type: ignore[arg-type]
    assert [row["phase"] for row in record.history] == ["i-bau-perturbation", "i-bau-unlearning"] * 2
    after = weights_of(network)
    assert record.history[0]["norm"] > 0
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, _ in network.named_parameters()}


def test_an_attention_that_is_fused_has_a_second_derivative_too(accelerator: Accelerator) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.patches, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, CLASSES)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.patches(images).flatten(2).transpose(1, 2)[:, None]
            return self.head(scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mean(1))

    network = Network(Attending(), toy_preprocessing()).eval()
    before = weights_of(network)
    run(IBAUConfig(epochs=1, batch_size=24), network, accelerator)  # type: ignore[arg-type]
    assert not torch.equal(before["model.patches.weight"], network.model.patches.weight)  # type: ignore[union-attr]


def test_seeds_and_state(accelerator: Accelerator, tmp_path: Path) -> None:
    assert_repeatable_and_tidy(SMALL, pixel_convnet, accelerator)  # type: ignore[arg-type]
    assert_resumes(SMALL, pixel_convnet, accelerator, tmp_path, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": "0"}, r"i-bau: share must be in \(0, 1\], got 0.0"),
        ({"terms": "0"}, "i-bau: terms must be at least 1, got 0"),
        ({"reweight": "class"}, "i-bau: reweight works from epoch .*; leave reweight out"),
    ],
)
def test_wrong_settings(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_defense("i-bau", settings)
