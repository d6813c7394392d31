"""D3's loss, starts, projection and state against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from hfdetox.defenses.auto import D3Config
from hfdetox.defenses.d3 import D3, project_to_sphere, start_weight
from hfdetox.errors import UsageError
from tests.tiny_training import norm_of, weights_of


def old_weight() -> torch.Tensor:
    """Return a weight of norm 5, mean 1.75 and variance (1.25² + 1.75² + 1.75² + 2.25²) / 4 = 3.1875."""
    return torch.tensor([[3.0, 0.0], [0.0, 4.0]])


def two_layers(**settings: Any) -> tuple[nn.Sequential, D3]:
    """Return two 2×2 Linear layers of norm 5 and 10, and D3 on both."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(old_weight())
        model[1].weight.copy_(2 * old_weight())
    return model, D3(model, D3Config(layers=("*",), **settings))


# --- loss ---


@pytest.mark.parametrize(
    ("lambda_", "expected"),
    [
        # per-sample hinge: (0 + (0.693147 − 0.5)) / 2 = 0.0965736; the hinge of the mean would be 0. Distance 5.
        (10.0, (10 * 0.0965736 - 5) / 11),
        (2.0, (2 * 0.0965736 - 5) / 3),
        (1.0, 0.0965736 - 5),
        (0.5, 0.5 * 0.0965736 - 5),
    ],
)
def test_loss_of_two_samples_by_hand(lambda_: float, expected: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(old_weight())
    d3 = D3(model, D3Config(lambda_=lambda_, epsilon=0.5, initialization="middle"))
    d3.initialize()
    # cross-entropies: −ln(3/4) = 0.287682 and ln 2 = 0.693147
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    terms = {name: value.detach() for name, value in d3.terms(logits, torch.tensor([0, 1])).items()}
    assert float(terms["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(terms["penalty"]) == pytest.approx(0.0965736, rel=1e-5)
    assert float(terms["clean_loss"]) == pytest.approx((0.287682 + 0.693147) / 2, rel=1e-5)
    assert float(terms["distance"]) == pytest.approx(5)
    assert float(terms["cosine"]) == 0
    assert torch.equal(d3.loss(logits, torch.tensor([0, 1])), terms["loss"])


def test_distances_of_several_layers_are_summed_and_cosines_averaged() -> None:
    model, d3 = two_layers(initialization="far", epsilon=9.0)
    d3.initialize()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[6.0, 0.0], [0.0, -8.0]]))
    terms = {name: value.detach() for name, value in d3.terms(torch.zeros(1, 2), torch.tensor([0])).items()}
    # ‖2 · W⁰‖ = 10, and 16 in one entry; cosines −1 and (36 − 64) / 100
    assert float(terms["distance"]) == pytest.approx(26)
    assert float(terms["cosine"]) == pytest.approx((-1 - 0.28) / 2)
    assert float(terms["loss"]) == pytest.approx(-26 / 11)


def test_sample_weights_replace_the_mean() -> None:
    _, d3 = two_layers(epsilon=0.5)
    logits, labels = torch.zeros(3, 2), torch.tensor([0, 1, 0])
    halves = d3.terms(logits, labels, torch.tensor([0.5, 0.25, 0.0]))
    assert float(halves["penalty"]) == pytest.approx(0.75 * (math.log(2) - 0.5), rel=1e-5)


def test_the_gradient_pushes_a_selected_weight_along_its_way_with_unit_length() -> None:
    model, d3 = two_layers(lambda_=1.0)
    d3.initialize()
    d3.loss(torch.zeros(1, 2, requires_grad=True), torch.tensor([0])).backward()
    for module, old in ((model[0], old_weight()), (model[1], 2 * old_weight())):
        way = module.weight.detach() - old
        torch.testing.assert_close(module.weight.grad, -way / way.norm())


@pytest.mark.parametrize("start", ["near", "middle"])
def test_the_gradient_is_finite_where_the_distance_has_a_corner_or_the_weight_is_zero(start: Any) -> None:
    model, d3 = two_layers(initialization=start)
    d3.initialize()
    d3.loss(torch.zeros(2, 2, requires_grad=True), torch.tensor([0, 1])).backward()
    assert all(torch.isfinite(module.weight.grad).all() for module in model)


def test_terms_are_float32_inside_autocast_and_for_half_logits() -> None:
    _, d3 = two_layers()
    d3.initialize()
    logits, labels = torch.randn(4, 2).bfloat16(), torch.tensor([0, 1, 0, 1])
    outside = d3.terms(logits.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = d3.terms(logits, labels)
    assert inside.keys() == outside.keys() == {"loss", "clean_loss", "penalty", "distance", "cosine"}
    for name, value in inside.items():
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert torch.equal(value, outside[name])
    assert [name for name, value in inside.items() if value.requires_grad] == ["loss"]


# --- where it starts ---


def test_starts_by_hand() -> None:
    old = old_weight()
    assert torch.equal(start_weight(old, "near"), old)
    assert torch.equal(start_weight(old, "middle"), torch.zeros(2, 2))
    assert torch.equal(start_weight(old, "far"), torch.tensor([[-3.0, 0.0], [0.0, -4.0]]))
    torch.manual_seed(1)
    noise = start_weight(old, "noise")
    torch.manual_seed(1)
    torch.testing.assert_close(noise, old + math.sqrt(3.1875) * torch.randn(2, 2))
    torch.manual_seed(1)
    random = start_weight(old, "random")
    torch.manual_seed(1)
    uniform = torch.rand(2, 2) - 0.5
    torch.testing.assert_close(random, 5 * uniform / uniform.norm())


@pytest.mark.parametrize("how", ["near", "middle", "far", "noise", "random"])
def test_a_start_leaves_the_old_weight_alone_and_shares_no_memory(how: Any) -> None:
    old = old_weight()
    start_weight(old, how).add_(1)
    assert torch.equal(old, old_weight())


def test_random_start_is_uniform_and_nearly_perpendicular() -> None:
    torch.manual_seed(0)
    old = torch.randn(100, 100) * 0.1
    start = start_weight(old, "random")
    # uniform on an interval: variance a² / 3 and nothing beyond a
    assert float(start.abs().max()) == pytest.approx(float(start.std()) * math.sqrt(3), rel=0.03)
    assert abs(float(torch.cosine_similarity(start.flatten(), old.flatten(), dim=0))) < 0.05


def test_initialize_moves_the_selected_weights_only() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = weights_of(model)
    D3(model, D3Config(initialization="far")).initialize()
    after = weights_of(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["1.weight"]
    assert torch.equal(after["1.weight"], -before["1.weight"])


# --- projection ---


@pytest.mark.parametrize("shape", [(3, 4), (4, 3, 3, 3)])
@pytest.mark.parametrize("radius", [0.01, 3.0, 500.0])
def test_projection_restores_the_norm_keeps_the_direction_and_is_idempotent(
    shape: tuple[int, ...], radius: float
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    projected = project_to_sphere(weight, radius)
    assert float(projected.norm()) == pytest.approx(radius, rel=1e-6)
    torch.testing.assert_close(projected / radius, weight / weight.norm())
    torch.testing.assert_close(project_to_sphere(projected, radius), projected)


@pytest.mark.parametrize("radius", [1.0, 10.0, 1e6])
def test_projection_of_a_zero_weight_is_zero(radius: float) -> None:
    assert torch.equal(project_to_sphere(torch.zeros(2, 3), radius), torch.zeros(2, 3))
    assert torch.isfinite(project_to_sphere(torch.full((2, 3), 1e-44), radius)).all()


def test_project_keeps_each_layers_own_initial_norm() -> None:
    model, d3 = two_layers()
    d3.initialize()
    with torch.no_grad():
        for module in model:
            module.weight.mul_(7).add_(0.5)
    directions = [module.weight.detach() / module.weight.norm() for module in model]
    d3.project()
    assert [norm_of(module) for module in model] == pytest.approx([5, 10])
    for module, direction in zip(model, directions, strict=True):
        torch.testing.assert_close(module.weight / module.weight.norm(), direction)


def test_project_writes_in_place() -> None:
    model, d3 = two_layers()
    storage = model[0].weight.data_ptr()
    d3.initialize()
    d3.project()
    assert model[0].weight.data_ptr() == storage


# --- layers ---


def test_a_layer_of_zeros_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    d3 = D3(model, D3Config(layers=("*",)))
    assert list(d3.weights) == ["1"]
    d3.initialize()
    d3.project()
    assert not model[0].weight.any()
    assert float(d3.terms(torch.zeros(1, 2), torch.tensor([0]))["distance"]) > 0


def test_only_layers_of_zeros_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(UsageError, match="weights of 0 are all zero; select other layers"):
        D3(model, D3Config())


# --- state ---


def test_state_round_trip_brings_the_initial_weights_to_a_moved_model() -> None:
    model, d3 = two_layers()
    saved = d3.state_dict()
    assert set(saved) == {"0", "1"}
    assert torch.equal(saved["0"], old_weight())
    d3.initialize()
    with torch.no_grad():
        model[0].weight.mul_(3)
    resumed = D3(model, D3Config(layers=("*",)))
    assert not torch.equal(resumed.state_dict()["0"], old_weight())
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.state_dict()["0"], old_weight())
    logits, labels = torch.zeros(1, 2), torch.tensor([0])
    assert torch.equal(resumed.loss(logits, labels), d3.loss(logits, labels))
    resumed.project()
    assert norm_of(model[0]) == pytest.approx(5)


def test_loaded_state_is_a_copy() -> None:
    _, d3 = two_layers()
    saved = {name: tensor.clone() for name, tensor in d3.state_dict().items()}
    d3.load_state_dict(saved)
    saved["0"].zero_()
    assert torch.equal(d3.state_dict()["0"], old_weight())


@pytest.mark.parametrize("state", [{}, {"0": torch.zeros(2, 2)}, {"0": torch.zeros(2, 2), "1": torch.zeros(3, 2)}])
def test_state_of_other_layers_is_refused(state: dict[str, torch.Tensor]) -> None:
    _, d3 = two_layers()
    with pytest.raises(UsageError, match=r"this model selects \['0', '1'\]"):
        d3.load_state_dict(state)
