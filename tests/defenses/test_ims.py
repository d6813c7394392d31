"""IMS: its masks and terms by hand, folding that is exact, stages that end, and a state left as it was."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.defenses.ims import IMS, IMSConfig, agree, disagree, masked_layers, soft_mask
from hfdetox.errors import UsageError
from hfdetox.models.network import Network
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Pass, Phase
from tests.defenses.runs import assert_resumes, one_batch, run
from tests.tiny_training import (
    ToyImages,
    _quick_garbage,
    accelerator,
    convnet,
    equal_weights,
    mlp,
    toy_preprocessing,
    weights_of,
)

__all__ = ["_quick_garbage", "accelerator"]

SMALL = IMSConfig(initial_rounds=2, free_rounds=1, sparse_rounds=1, inner_steps=2, batch_size=16)
# S(0) = σ(−10), S(1) = σ(10)
LOW, HIGH = 1 / (1 + math.exp(10)), 1 / (1 + math.exp(-10))


def ready(body: Any) -> Any:
    """Return a toy network's body as hfdetox's own Network, on 8×8 images."""
    return Network(body.model, toy_preprocessing()).eval()


def conv() -> Any:
    return ready(convnet())


class Attention(nn.Module):
    """Two heads of two numbers over tokens, laid out as timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(4, 12)
        self.proj = nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        count, length, width = tokens.shape
        q, k, v = self.qkv(tokens).view(count, length, 3, 2, 2).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(count, length, width))


class TinyViT(nn.Module):
    """One block without BatchNorm: attention and an MLP of 6 hidden units, on four patches of an 8×8 image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 4, 4, stride=4)
        self.attn = Attention()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(tokens)
        tokens = tokens + self.fc2(nn.functional.gelu(self.fc1(tokens)))
        return self.head(tokens.mean(1))


def vit() -> Any:
    return Network(TinyViT(), toy_preprocessing()).eval()


# --- the equations ---


@pytest.mark.parametrize(
    ("mask", "selection", "forward", "inverse"),
    [
        # shared by both, whatever the mask
        (1.0, 1.0, 1.0, 1.0),
        (0.3, 1.0, 1.0, 1.0),
        # of exactly one side
        (1.0, 0.0, HIGH, LOW),
        (0.0, 0.0, LOW, HIGH),
        (0.5, 0.0, 0.5, 0.5),
        # 1/2 + s/2
        (0.5, 0.5, 0.75, 0.75),
        # S + s (1 − S) = σ(−10) + (1 − σ(−10)) / 4
        (0.0, 0.25, LOW + 0.25 * (1 - LOW), HIGH + 0.25 * (1 - HIGH)),
    ],
)
def test_forward_and_inverse_masks(mask: float, selection: float, forward: float, inverse: float) -> None:
    ims = IMS(conv(), IMSConfig())
    with torch.no_grad():
        ims.mask.fill_(mask)
        ims.selection.fill_(selection)
    found = [values[0].item() for values in ims.masks()]
    assert found == pytest.approx([forward, inverse], abs=1e-6)


def test_steepness_is_the_masks() -> None:
    # σ(4 · (3/4 − 1/2)) = σ(1)
    found = soft_mask(torch.tensor(0.75), torch.tensor(0.0), 4.0)
    assert found.item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6)


def test_agree_and_disagree() -> None:
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0], [0.9, 0.1]])
    q = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.2, 0.8]])
    # overlaps 1/2, 1, 0 and 0.18 + 0.08 = 0.26
    tiny = -math.log(1e-8)
    assert agree(p, q).tolist() == pytest.approx([math.log(2), 0, tiny, -math.log(0.26)], rel=1e-4, abs=1e-6)
    assert disagree(p, q).tolist() == pytest.approx([math.log(2), tiny, 0, -math.log(0.74)], rel=1e-4, abs=1e-6)


def test_at_the_start_both_sides_are_the_network_itself() -> None:
    network = conv()
    ims = IMS(network, IMSConfig())
    batch = one_batch()
    own = network(batch.images).softmax(1)
    for values in ims.masks():
        torch.testing.assert_close(ims.probabilities(batch.images, values), own)
    overlap = own.square().sum(1)
    terms = ims(batch, False, 10.0)
    expected = -overlap.log().mean() - (1 - overlap).log().mean()
    # 10 · mean(1 − s) is 0 at s = 1
    assert terms["sparsity"].item() == 0
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_terms_of_a_round_with_given_perturbations(monkeypatch: pytest.MonkeyPatch) -> None:
    network = conv()
    ims = IMS(network, IMSConfig())
    with torch.no_grad():
        ims.mask.copy_(torch.linspace(0, 1, 8))
        ims.selection.copy_(torch.linspace(1, 0.2, 8))
    batch = one_batch(6)
    delta = torch.full(batch.images.shape, 0.1)
    monkeypatch.setattr(ims, "perturbation", lambda x, own: delta)
    terms = ims(batch, True, 4.0)

    def masked(images: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
        # a convolution's output times the mask, by a hook: what multiplying its weights must equal
        layer = network.model[0]
        hook = lambda m, i, out: out if values is None else out * values.view(1, -1, 1, 1)  # noqa: E731
        handle = layer.register_forward_hook(hook)
        try:
            return network(images).softmax(1)
        finally:
            handle.remove()

    def log(p: torch.Tensor, q: torch.Tensor, *, same: bool) -> float:
        overlap = (p * q).sum(1)
        return -(overlap if same else 1 - overlap).log().mean().item()

    kept, inverse = (values.detach() for values in ims.masks())
    x = batch.images.float()
    moved = x + 25.5
    own, perturbed_probs = masked(x, None), masked(moved, None)
    expected = {
        "agreement": log(masked(x, kept), own, same=True),
        "opposition": log(masked(x, inverse), own, same=False),
        "recovery": log(masked(moved, kept), own, same=True),
        "complicity": log(masked(moved, inverse), perturbed_probs, same=True)
        + log(masked(moved, inverse), own, same=False),
        # the mean of 1 − s: s runs evenly from 1 to 0.2
        "sparsity": 4 * 0.4,
    }
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-4)


def test_perturbations_take_signed_steps_of_adam_at_first() -> None:
    ims = IMS(conv(), IMSConfig(inner_steps=1, inner_rate=0.01))
    batch = one_batch(6)
    x = batch.images.float()
    with torch.no_grad():
        own = ims.probabilities(x)
    delta = ims.perturbation(x, own)
    moved = x.clone().requires_grad_()
    there = ims.probabilities(moved)
    aims = disagree(there, own) + agree(ims.probabilities(moved, ims.masks()[1].detach()), there)
    (slope,) = torch.autograd.grad(aims.sum(), moved)
    # Adam's first step is −lr · g / (|g| + 1e-8) with g the slope in pixels of 0 to 1, 255 times that in grey levels
    torch.testing.assert_close(delta, -0.01 * 255 * slope / (255 * slope.abs() + 1e-8), rtol=1e-3, atol=1e-6)


# --- folding ---


@pytest.mark.parametrize("make", [conv, vit], ids=["conv", "hidden"])
def test_folding_is_exact_and_changes_the_masked_weights_alone(make: Any, accelerator: Accelerator) -> None:
    network = make()
    ims = IMS(network, IMSConfig())
    torch.manual_seed(1)
    with torch.no_grad():
        ims.mask.uniform_(0, 1)
        ims.selection.uniform_(0, 1)
    images, before = one_batch().images, weights_of(network)
    masked = ims.probabilities(images, ims.masks()[0].detach())
    assert not torch.allclose(masked, network(images).softmax(1))
    with torch.no_grad():
        ims.compare(network, one_batch())
        found = ims.fold(accelerator)
    torch.testing.assert_close(network(images).softmax(1), masked, rtol=0, atol=0)
    changed = {name for name, tensor in weights_of(network).items() if not torch.equal(before[name], tensor)}
    masked_names = {name for layer in ims.channels.layers for name in (layer.weight, layer.shift) if name}
    assert changed == masked_names
    kept = ims.masks()[0]
    assert found["kept"] == pytest.approx((kept >= 0.5).float().mean().item())
    assert 0 <= found["unchanged_answers"] <= 1


def test_a_convolutions_output_is_multiplied_with_its_bias(accelerator: Accelerator) -> None:
    network = conv()
    ims = IMS(network, IMSConfig())
    weight, bias = (tensor.detach().clone() for tensor in network.model[0].parameters())
    with torch.no_grad():
        ims.selection.zero_()
        # a' = S(a): 1/2 for the first channel, σ(10) for the others
        ims.mask[0] = 0.5
        ims.compare(network, one_batch())
        ims.fold(accelerator)
    torch.testing.assert_close(network.model[0].weight[0], weight[0] / 2)
    torch.testing.assert_close(network.model[0].bias[0], bias[0] / 2)
    torch.testing.assert_close(network.model[0].weight[1:], weight[1:] * HIGH)


def test_units_are_convolutions_with_batchnorm_and_hidden_units_and_heads_without() -> None:
    assert [(layer.weight, layer.shift, layer.units) for layer in masked_layers(conv(), "auto")] == [
        ("model.0.weight", "model.0.bias", 8)
    ]
    # two heads of two columns, six hidden units
    assert {(layer.weight, layer.units, layer.width) for layer in masked_layers(vit(), "auto")} == {
        ("model.attn.proj.weight", 2, 2),
        ("model.fc2.weight", 6, 1),
    }
    assert [layer.weight for layer in masked_layers(vit(), "conv")] == ["model.embed.weight"]
    assert IMS(conv(), IMSConfig()).sparsity == 10
    assert IMS(vit(), IMSConfig()).sparsity == 0
    assert IMS(vit(), IMSConfig(sparsity=3.0)).sparsity == 3


def test_a_network_without_such_units_is_refused() -> None:
    with pytest.raises(UsageError, match="has no convolutions whose masks could be folded"):
        IMSConfig(units="conv").phases(ready(mlp()))


# --- stages and ablations ---


def test_the_stages_and_their_sparsity() -> None:
    network = conv()
    phases = IMSConfig().phases(network)
    assert [phase.name for phase in phases] == ["ims-initial", "ims-free", "ims-sparse", "ims-fold"]
    assert [(phase.epochs, phase.steps) for phase in phases if isinstance(phase, Phase)] == [
        (100, 1),
        (200, 1),
        (200, 1),
    ]
    assert isinstance(phases[-1], Pass)
    only = IMSConfig(**IMSConfig.presets["no-perturbation"]).phases(network)
    assert [phase.name for phase in only] == ["ims-initial", "ims-fold"]


def test_a_stage_ends_after_so_many_rounds_without_two_percent() -> None:
    ims = IMS(conv(), IMSConfig(patience=2))
    ims.begin_stage()
    # 0.99 is not 2 % better than 1, 0.97 is; then 0.96 and 0.951 are not better than 0.98 · 0.97 = 0.9506
    totals = [1.0, 0.99, 0.97, 0.96, 0.951]
    assert [ims.stalled({"loss": total}) for total in totals] == [False, False, False, False, True]
    ims.begin_stage()
    assert not ims.stalled({"loss": 5.0})


def test_without_selection_every_unit_is_on_one_side(accelerator: Accelerator) -> None:
    ims = IMS(conv(), IMSConfig(selection=False))
    stage = ims.stage("s", 1, perturbed=False, sparsity=10.0)
    assert len(stage.parameters) == 1
    forward, inverse = ims.masks()
    torch.testing.assert_close(forward, torch.full((8,), HIGH))
    torch.testing.assert_close(inverse, torch.full((8,), LOW))


def test_without_the_inverse_mask_its_terms_are_gone() -> None:
    batch = one_batch(6)
    terms = IMS(conv(), IMSConfig(inverse=False, inner_steps=1))(batch, True, 10.0)
    assert set(terms) == {"loss", "agreement", "recovery", "sparsity"}


# --- in the engine ---


def test_masks_stay_in_their_range_and_all_but_the_masked_weights_stay(accelerator: Accelerator) -> None:
    network = conv()
    before = weights_of(network)
    # with λ₁ at 10 the eight units of this network would all stay shared (s = 1), and no weight would change
    record = run(replace(SMALL, sparsity=0.0), network, accelerator)
    assert [row["phase"] for row in record.history] == ["ims-initial"] * 2 + ["ims-free", "ims-sparse", "ims-fold"]
    # four rounds of 16 images each
    assert (record.steps, record.images) == (4, 64)
    after = weights_of(network)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"model.0.weight", "model.0.bias"}
    assert changed


def test_it_is_repeatable_and_tidy(accelerator: Accelerator) -> None:
    results = []
    for noise in (1, 2):
        network = conv()
        network.model[6].weight.requires_grad_(False)
        torch.manual_seed(noise)
        run(SMALL, network, accelerator)
        frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
        assert frozen == ["model.6.weight"]
        assert all(p.grad is None for p in network.parameters())
        assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        results.append(weights_of(network))
    assert equal_weights(*results)


def test_it_resumes(accelerator: Accelerator, tmp_path: Path) -> None:
    assert_resumes(SMALL, conv, accelerator, tmp_path, saves=5)


def test_a_stage_has_one_optimiser_for_all_its_rounds(accelerator: Accelerator) -> None:
    network = conv()
    phases = IMSConfig(initial_rounds=3, free_rounds=2, sparse_rounds=0, inner_steps=1, batch_size=16).phases(network)
    made: list[torch.optim.Optimizer] = []
    for phase in phases[:2]:
        assert isinstance(phase, Phase)

        def noting(parameters: list[nn.Parameter], make: Any = phase.optimizer) -> torch.optim.Optimizer:
            made.append(make(parameters))
            return made[-1]

        phase.optimizer = noting
    Engine(accelerator, ToyImages(16), seed=0).run(network, phases)
    assert [[float(state["step"]) for state in each.state.values()] for each in made] == [[3, 3], [2, 2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_rounds": 0, "free_rounds": 0, "sparse_rounds": 0}, "ims: the rounds of the three stages are all 0"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ({"steepness": 0.0}, "steepness must be positive and finite, got 0.0"),
        ({"sparsity": -1.0}, "sparsity must be at least 0 and finite, or none, got -1.0"),
        ({"units": "tokens"}, "units must be one of auto, conv, hidden"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        IMSConfig(**settings)
