"""BNA: histograms, the map of a unit and its bound by hand; f̃ undoes a shift; the correction beside a saved model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from hfdetox.defenses._histograms import best_bound, histograms, jensen_shannon, kullback_leibler, total_variation
from hfdetox.defenses.bna import BNA, BNAConfig, fold, matching_map
from hfdetox.errors import UsageError
from hfdetox.models.network import (
    Correction,
    Network,
    UnitMap,
    channel_axis,
    channels_of,
    norms_of,
    on_output,
    uncorrected,
)
from hfdetox.triggers import BadNets
from tests.defenses.runs import assert_resumes, one_batch, run
from tests.tiny_training import _quick_garbage, accelerator, convnet, equal_weights, mlp, toy_preprocessing, weights_of

__all__ = ["_quick_garbage", "accelerator"]


@torch.no_grad()
def flagged(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Tell which images (N×C×H×W, 0 to 255) the network's correction takes for triggered: f(x) = t and f̃(x) ≠ t.

    Returns (N,) of bool; none is flagged by a network without a correction, as where BNA found nothing to correct.
    """
    correction = network.correction
    if correction is None:
        return torch.zeros(len(images), dtype=torch.bool, device=images.device)
    with uncorrected(network):
        own = network(images).argmax(1)
    return (own == correction.target) & (network(images).argmax(1) != correction.target)


def conv() -> Network:
    """Return a network whose one norm is `1`, with statistics that are not the start's."""
    body = convnet().model
    torch.manual_seed(5)
    body[1].running_mean.normal_(std=0.1)
    body[1].running_var.uniform_(0.2, 0.5)
    return Network(body, toy_preprocessing()).eval()


def doubles(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# --- the equations ---


def test_a_units_map_takes_mean_and_deviation_to_the_clean_ones() -> None:
    # the first: seen 3 ± 2, wanted 1 ± 1: z' = (z − 3) / 2 + 1 = z / 2 − 1/2; the second does not vary: it is shifted
    mean, deviation = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0])
    scale, shift = matching_map(mean, deviation, torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
    assert scale.tolist() == [0.5, 1]
    assert shift.tolist() == [-0.5, 3]
    # 5 ↦ 2, cut to 1.75; 1 ↦ 0; and 7 ↦ 10
    unit_map = UnitMap(scale, shift, torch.tensor([1.75, math.inf]))
    assert unit_map(torch.tensor([[5.0, 7.0], [1.0, 7.0]]), 1).tolist() == [[1.75, 10], [0, 10]]


def test_a_map_acts_on_the_axis_of_the_channels() -> None:
    unit_map = UnitMap(torch.tensor([1.0, 2.0]), torch.zeros(2), torch.full((2,), math.inf))
    found = unit_map(torch.ones(1, 2, 2, 2), 1)
    assert found[0, 0].unique().tolist() == [1]
    assert found[0, 1].unique().tolist() == [2]
    assert unit_map(torch.ones(1, 2, 2, 2), 3)[0, 0].tolist() == [[1, 2], [1, 2]]


def test_histograms_have_open_ends() -> None:
    values = torch.tensor([[-5.0, 0.05, 0.15, 0.18], [0.25, 0.35, 9.0, 0.05]])
    # bins [0, .1), [.1, .2), [.2, .3): what lies outside counts at the ends
    assert histograms(values, 0.0, 0.1, 3).tolist() == [[2, 2, 0], [1, 0, 3]]


def test_the_bound_minimises_the_total_variation() -> None:
    seen = doubles([[2, 1, 1], [1, 1, 2], [0, 0, 4]])
    wanted = doubles([[2, 2, 0], [1, 1, 2], [4, 0, 0]])
    # bound in bin 1, the last, and 0. Of the first, by bin: |4 − 2| + 2 + 0, 0 + |2 − 2| + 0, 0 + 1 + |1 − 0|;
    # without a bound 2
    bound, variation = best_bound(seen, wanted, 1.0, 0.1)
    assert bound.tolist() == pytest.approx([1.15, math.inf, 1.05])
    assert variation.tolist() == [0, 0, 0]


def test_the_divergences_of_bins_by_hand() -> None:
    seen, wanted = doubles([[4, 0, 2, 0]]), doubles([[2, 2, 0, 0]])
    assert total_variation(seen, wanted).tolist() == [[2, 2, 2, 0]]
    # 4 ln 2, nothing, 2 ln(2 / 1) of the bin that counts as 1, nothing
    assert kullback_leibler(seen, wanted)[0].tolist() == pytest.approx([4 * math.log(2), 0, 2 * math.log(2), 0])
    # m = 3, 1, 1, 0: (4 ln(4/3) + 2 ln(2/3)) / 2, 2 ln(2) / 2 twice, nothing
    first = 2 * math.log(4 / 3) + math.log(2 / 3)
    assert jensen_shannon(seen, wanted)[0].tolist() == pytest.approx([first, math.log(2), math.log(2), 0])


def test_what_lies_above_a_bound_counts_in_its_bin_for_every_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    seen, wanted = (torch.randint(0, 9, (5, 6), generator=generator).double() for _ in range(2))
    for apart in (total_variation, kullback_leibler, jensen_shannon):
        tried = []
        for place in range(6):
            clipped = seen.clone()
            clipped[:, place] = seen[:, place:].sum(1)
            clipped[:, place + 1 :] = 0
            tried.append(apart(clipped, wanted).sum(1))
        _, distance = best_bound(seen, wanted, 0.0, 0.1, apart)
        torch.testing.assert_close(distance, torch.stack(tried).amin(0))


def test_of_equal_bounds_the_lowest_is_taken() -> None:
    # three lie beyond the reference: gathered in its last bin or left where they are, they are three too many
    bound, variation = best_bound(doubles([[2, 1, 0, 3]]), doubles([[2, 1, 0, 0]]), 0.0, 0.1)
    assert bound.tolist() == pytest.approx([0.15])
    assert variation.tolist() == [3]
    # the last bin is open: a bound there is none
    bound, _ = best_bound(doubles([[2, 1, 3]]), doubles([[2, 1, 3]]), 0.0, 0.1)
    assert bound.tolist() == [math.inf]


# --- where norms give their outputs ---


class NormThenAct(nn.BatchNorm2d):
    """As timm's: the activation is inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(images)))


def test_a_norm_with_an_activation_inside_is_mapped_before_it() -> None:
    norm = NormThenAct(2).eval()
    values = torch.full((1, 2, 1, 1), -1.0)
    assert norm(values).unique().tolist() == [0]
    seen: list[torch.Tensor] = []
    with on_output(norm, lambda output, axis: seen.append(output.clone())):
        norm(values)
    assert seen[0].unique().item() == pytest.approx(-1, abs=1e-4)
    with on_output(norm, UnitMap(torch.ones(2), torch.full((2,), 3.0), torch.full((2,), math.inf))):
        assert norm(values).unique().item() == pytest.approx(2, abs=1e-4)
    assert not norm.drop._forward_pre_hooks


@pytest.mark.parametrize(
    ("norm", "axis"), [(nn.BatchNorm2d(4), 1), (nn.GroupNorm(2, 4), 1), (nn.LayerNorm(4), 3)], ids=["bn", "gn", "ln"]
)
def test_the_axis_of_the_channels(norm: nn.Module, axis: int) -> None:
    assert channel_axis(norm, torch.zeros(2, 4, 4, 4)) == axis


def test_norms_are_found_in_the_models_order() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)
    )
    assert norms_of(model) == ["1", "2"]


# --- the passes ---


def fitted(network: Network, accelerator: Accelerator, trigger: Path, **settings: Any) -> Any:
    return run(BNAConfig(trigger=str(trigger), batch_size=20, **settings), network, accelerator)  # type: ignore[arg-type]


@pytest.fixture
def trigger(tmp_path: Path) -> Path:
    path = tmp_path / "patch.safetensors"
    BadNets(target=1, size=16).save(path)
    return path


def outputs(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Return what the norm gives, channel by channel (C×M)."""
    seen: list[torch.Tensor] = []
    with (
        torch.no_grad(),
        on_output(network.model[1], lambda output, axis: seen.append(output.movedim(1, 0).flatten(1))),
    ):
        network(images)
    return seen[0]


def test_triggered_activations_get_the_clean_mean_and_deviation(accelerator: Accelerator, trigger: Path) -> None:
    network = conv()
    batch = one_batch()
    before = weights_of(network)
    stamped = BadNets(target=1, size=16).apply(batch.images)
    clean, shifted = outputs(network, batch.images), outputs(network, stamped)
    assert (clean.mean(1) - shifted.mean(1)).abs().max() > 0.05
    record = fitted(network, accelerator, trigger, bounds=False)
    assert [row["phase"] for row in record.history] == ["bna-moments", "bna-map 1", "bna-detection"]
    assert network.correction is not None
    # the correction's own hook comes first, so that the outputs seen are the mapped ones
    correction, network.correction = network.correction, None
    with correction.applied(network.model):
        mapped = outputs(network, stamped)
    torch.testing.assert_close(mapped.mean(1), clean.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mapped.std(1, correction=0), clean.std(1, correction=0), rtol=1e-3, atol=1e-4)
    assert equal_weights(before, weights_of(network))


def test_a_bound_brings_the_histogram_nearer(accelerator: Accelerator, trigger: Path) -> None:
    images = one_batch().images
    stamped = BadNets(target=1, size=16).apply(images)
    apart = []
    for bounds in (False, True):
        network = conv()
        clean = outputs(network, images)
        low = math.floor(float(clean.min()) / 0.1) * 0.1
        fitted(network, accelerator, trigger, bounds=bounds)
        assert network.correction is not None
        correction, network.correction = network.correction, None
        with correction.applied(network.model):
            found = outputs(network, stamped)
        counts = [histograms(values, low, 0.1, 200).double() for values in (found, clean)]
        apart.append((counts[0] - counts[1]).abs().sum(1))
    assert (apart[1] <= apart[0] * 1.01 + 4).all()


def test_only_inputs_given_to_the_target_are_asked_again(accelerator: Accelerator, trigger: Path) -> None:
    network = conv()
    images = one_batch().images
    with torch.no_grad():
        plain = network(images)
        fitted(network, accelerator, trigger)
        routed = network(images)
        correction, network.correction = network.correction, None
        assert correction is not None
        with correction.applied(network.model):
            corrected = network(images)
    led = plain.argmax(1) == 1
    torch.testing.assert_close(routed[~led], plain[~led])
    torch.testing.assert_close(routed[led], corrected[led])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_without_moments_outputs_are_only_cut(accelerator: Accelerator, trigger: Path) -> None:
    network = conv()
    record = fitted(network, accelerator, trigger, moments=False)
    names = ["bna-moments", "bna-histograms", "bna-bound 1", "bna-detection"]
    assert [row["phase"] for row in record.history] == names
    assert network.correction is not None
    unit_map = network.correction.maps["1"]
    assert unit_map.scale.tolist() == [1] * 8
    assert unit_map.shift.tolist() == [0] * 8


def test_what_is_folded_is_what_was_fitted(accelerator: Accelerator, trigger: Path) -> None:
    """A norm cannot hold a bound, so none may have had a part in the maps, nor in what the history says."""
    folded, unbounded = conv(), conv()
    record = fitted(folded, accelerator, trigger, result="fold")
    fitted(unbounded, accelerator, trigger, bounds=False)
    assert {row["phase"].split()[0] for row in record.history} == {"bna-moments", "bna-map", "bna-detection"}
    assert folded.correction is None
    correction, unbounded.correction = unbounded.correction, None
    assert correction is not None
    images = one_batch().images
    with correction.applied(unbounded.model):
        expected = unbounded(images)
    torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-5)


def test_a_target_that_the_model_has_not_is_refused(trigger: Path) -> None:
    with pytest.raises(UsageError, match=r"the classes 0 to \d+; the trigger's target is 99"):
        BNAConfig(trigger=str(trigger), target=99).phases(conv())


def test_a_response_normalisation_is_no_norm() -> None:
    """Its output is N×H×W×C in some models and N×C×H×W in others, and it divides by what the whole image has."""
    assert channels_of(GlobalResponseNorm(8)) == 0
    assert channels_of(nn.BatchNorm2d(8)) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moments": False, "bounds": False}, "cannot both be off"),
        ({"moments": False, "result": "fold"}, "result=fold folds the moments alone"),
        ({"divergence": "ks"}, "divergence must be one of total-variation, js, kl"),
        ({"bin_width": 0.0}, "bna: bin_width must be positive and finite, got 0.0"),
        ({"target": -1}, "bna: target must be at least 0, or none, got -1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BNAConfig(**settings)


def test_flagged_are_those_that_leave_the_target(accelerator: Accelerator, trigger: Path) -> None:
    network = conv()
    images = one_batch().images
    own = network(images).argmax(1)
    assert not flagged(network, images).any()
    # in f̃ the norm's outputs are 0, so that all images have the answer of the biases; targets are tried in turn
    maps = {"1": UnitMap(torch.zeros(8), torch.zeros(8), torch.full((8,), math.inf))}
    for target in own.unique().tolist():
        network.correction = Correction(target, maps)
        with network.correction.applied(network.model):
            constant = int(network.model(torch.zeros(1, 3, 8, 8)).argmax())
        expected = (own == target) & (constant != target)
        assert torch.equal(flagged(network, images), expected)
        assert network.correction.target == target


def test_routing_by_hand() -> None:
    """f is the identity on two numbers, f̃ adds (0, −5) behind the norm: f's answer 1 becomes 0, its answer 0 stays."""
    norm = nn.BatchNorm1d(2).eval()
    maps = {"0": UnitMap(torch.ones(2), torch.tensor([0.0, -5.0]), torch.full((2,), math.inf))}
    model = nn.Sequential(norm)
    inputs = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    found = Correction(1, maps).logits(model, model, inputs, model(inputs))
    assert found.flatten().tolist() == pytest.approx([1, -3, 3, 0], abs=1e-3)


@pytest.mark.parametrize(("result", "saves"), [("fold", 3), ("route", 5)])
def test_it_resumes(result: Any, saves: int, accelerator: Accelerator, tmp_path: Path, trigger: Path) -> None:
    config = BNAConfig(trigger=str(trigger), batch_size=20, result=result)
    assert_resumes(config, conv, accelerator, tmp_path, saves=saves)  # type: ignore[arg-type]


def test_folding_is_the_map_without_its_bound() -> None:
    network = conv()
    images = one_batch().images
    maps = {"1": UnitMap(torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8), torch.full((8,), math.inf))}
    correction = Correction(1, maps)
    with correction.applied(network.model):
        expected = network(images)
    fold(network.model, correction)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


# --- refusals, and Neural Cleanse's part ---


def test_a_network_without_norms_is_refused(trigger: Path) -> None:
    network = Network(mlp().model, toy_preprocessing())
    with pytest.raises(UsageError, match="bna: Sequential has no norm with a scale a channel"):
        BNAConfig(trigger=str(trigger)).phases(network)


def test_a_trigger_without_a_target_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    BadNets(target="cat").save(path)
    with pytest.raises(UsageError, match="has the target 'cat'; give its label's index with --set target=N"):
        BNAConfig(trigger=str(path)).phases(conv())
    assert BNAConfig(trigger=str(path), target=2).phases(conv())


def test_a_target_without_a_trigger_is_refused() -> None:
    with pytest.raises(UsageError, match="target says where a trigger leads; give the trigger too"):
        BNAConfig(target=0)


def test_without_a_trigger_neural_cleanse_looks_first_and_nothing_happens_when_it_flags_none() -> None:
    network = conv()
    phases = BNAConfig().phases(network)
    assert [phase.name for phase in phases[:3]] == ["nc-inversion", "nc-verdict", "bna-moments"]
    bna = phases[2].state
    assert isinstance(bna, BNA)
    bna.begin()
    assert bna.target == -1
    assert bna.inversion is not None
    bna.inversion.flagged[:] = torch.tensor([False, True, True])
    bna.inversion.best_norm[:] = torch.tensor([1.0, 5.0, 4.0])
    bna.inversion.best_masks[2].fill_(0.5)
    bna.inversion.best_patterns[2].fill_(0.2)
    bna.begin()
    # the smaller of the flagged: half of 100 and half of 51
    assert bna.target == 2
    assert bna.triggered(torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)).unique().tolist() == pytest.approx([75.5])
