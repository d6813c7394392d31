"""SAU: the search for shared perturbations and the terms of the loss by hand, and a run against a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy, softmax

from hfdetox.defenses import parse_defense
from hfdetox.defenses.sau import SAUConfig, SharedPair, jensen_shannon
from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Phase
from tests.defenses.pixels import corner_backdoored, linear, pixel_convnet, pixels
from tests.defenses.runs import assert_repeatable_and_tidy, assert_resumes, noted, run
from tests.tiny_training import ToyImages, _quick_garbage, accelerator, equal_weights, weights_of

__all__ = ["_quick_garbage", "accelerator"]

SMALL = SAUConfig(epochs=2, batch_size=24, learning_rate=1e-3)
LN3 = math.log(3)


def test_the_divergence_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/4, 3/4), m = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2, the same for both
    logits, others = torch.tensor([[LN3, 0.0], [5.0, 5.0]]), torch.tensor([[0.0, LN3], [1.0, 1.0]])
    assert jensen_shannon(logits, others).tolist() == pytest.approx([0.130812, 0], abs=1e-6)


def test_what_a_perturbation_minimises_by_hand() -> None:
    config = SAUConfig(lambda_3=0.01, lambda_4=2.0)
    # neither is fooled; both are, to the same class; the trained one alone is
    logits = torch.tensor([[LN3, 0.0], [0.0, LN3], [0.0, LN3]])
    reference = torch.tensor([[LN3, 0.0], [0.0, LN3], [LN3, 0.0]])
    zeros = torch.zeros(3, dtype=torch.int64)
    # ln 4/3 = 0.287682: of both models, of none, of the reference; divergences 0 and, of the last, 0.130812
    expected = 2 * 0.130812 - 0.01 * (0.287682 + 0.287682 / 2)
    assert float(config.search_loss(logits, reference, zeros, zeros, zeros)) == pytest.approx(expected, rel=1e-4)


def test_fooled_is_measured_against_a_models_own_answer() -> None:
    config = SAUConfig(lambda_3=1.0, lambda_4=0.0)
    logits, one, zero = torch.tensor([[0.0, LN3]]), torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    # the label is 0, but both said 1 before: not fooled, and the error is ln 4 of each
    assert float(config.search_loss(logits, logits, zero, one, one)) == pytest.approx(-math.log(4))
    assert float(config.search_loss(logits, logits, zero, zero, zero)) == 0


def test_shared_adversarial_examples_of_a_linear_model_by_hand() -> None:
    """logits = pixels, both of class 0. δ starts at (0.2, 0.2), and a step is (−0.2, +0.2) while class 0 leads.

    (0.4, 0.1): (0.6, 0.3), then (0.4, 0.3), then (0.2, 0.3): fooled, both models alike, and δ stays (−0.2, 0.2).
    (0.25, 0.1): (0.45, 0.3), then (0.25, 0.3): shared after one step, where the other image goes on.
    """
    pair = SharedPair(linear([[1, 0], [0, 1]]), SAUConfig())
    delta, *_ = pair.perturbation(pixels((0.4, 0.1), (0.25, 0.1)), torch.tensor([0, 0]))
    torch.testing.assert_close(delta.flatten(1), torch.tensor([[-0.2, 0.2], [0.0, 0.2]]), rtol=0, atol=1e-6)
    assert pair.network.model[1].weight.grad is None  # type: ignore[index]


def whole_search(pair: SharedPair, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return δ with every image in every step, and no step left out."""
    config = pair.config
    before, known = pair.network(x).argmax(1), pair.reference(x).argmax(1)
    delta = config.first_perturbation(x)
    for _ in range(config.steps):
        delta.requires_grad_()
        moved = x + 255 * delta
        loss = config.search_loss(pair.network(moved), pair.reference(moved), labels, before, known)
        gradient = torch.autograd.grad(loss, delta)[0]
        delta = config.project(delta.detach() - config.step * gradient.sign())
    return delta


@pytest.mark.parametrize(("norm", "radius", "step"), [("linf", 0.2, 0.05), ("l2", 1.5, 0.1)])
def test_leaving_out_images_that_are_shared_changes_nothing(norm: str, radius: float, step: float) -> None:
    pair = SharedPair(corner_backdoored(), SAUConfig(norm=norm, radius=radius, step=step))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in pair.network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    toys = ToyImages(24)
    assert toys.images is not None
    x = toys.images.float()
    delta, clean, perturbed = pair.perturbation(x, toys.labels)
    # the size of a batch may turn the sign of a gradient that is all but 0, and so move a pixel
    different = (delta - whole_search(pair, x, toys.labels)).abs() > 1e-6
    assert float(different.float().mean()) < 0.01
    with torch.no_grad():
        torch.testing.assert_close(clean, pair.reference(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(perturbed, pair.reference(x + 255 * delta), rtol=1e-3, atol=1e-3)
    # some left the search, and others did not
    now = pair.network(x + 255 * delta)
    shared = pair.config.shared(now, perturbed, pair.network(x).argmax(1), clean.argmax(1))
    assert 0 < int(shared.sum()) < len(shared)


def test_a_perturbation_goes_where_both_models_agree() -> None:
    """λ₃ = 0: the divergence alone. With z = z_0 − z_1, f_θ has z = a − 2b and f₀ a − b: class 0 at (0.3, 0.14).

    It grows with the gap |b| between the two z, and at equal gap is largest where their mean a − 1.5 b is 0.
    (0.5, 0.34): f_θ alone is fooled, mean −0.01: both down. (0.3, 0.14): mean 0.09: a up, b down. (0.5, −0.06): b up.
    (0.5, 0.14): b down. (0.5, −0.06): b up. So δ is (0.2, 0) after five steps.
    """
    pair = SharedPair(linear([[1, 0], [0, 1]]), SAUConfig(lambda_3=0.0))
    with torch.no_grad():
        pair.network.model[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # type: ignore[index]
    delta, *_ = pair.perturbation(pixels((0.3, 0.14)), torch.tensor([0]))
    torch.testing.assert_close(delta.flatten(), torch.tensor([0.2, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("norm", "radius", "expected"), [("linf", 7.0, [6.0, 7.0]), ("l2", 5.0, [3.0, 4.0])])
def test_projection(norm: str, radius: float, expected: list[float]) -> None:
    config = SAUConfig(norm=norm, radius=radius)  # type: ignore[arg-type]
    inside = torch.tensor([1.0, -2.0])
    delta = torch.stack([torch.tensor([6.0, 8.0]), inside]).view(2, 1, 1, 2)
    torch.testing.assert_close(config.project(delta).flatten(1), torch.stack([torch.tensor(expected), inside]))


@pytest.mark.parametrize(("start", "value"), [("max", 0.2), ("min", -0.2), ("zero", 0.0)])
def test_where_a_perturbation_starts(start: str, value: float) -> None:
    first = SAUConfig(start=start).first_perturbation(torch.ones(2, 3, 4, 4))  # type: ignore[arg-type]
    assert torch.equal(first, torch.full((2, 3, 4, 4), value))


def test_the_terms_of_the_loss_by_hand() -> None:
    config = SAUConfig(lambda_1=2.0, lambda_2=3.0)
    labels, weights = torch.zeros(4, dtype=torch.int64), torch.tensor([0.4, 0.3, 0.2, 0.1])
    yes, no = [LN3, 0.0], [0.0, LN3]
    clean = torch.tensor([yes] * 4)
    # the old model is fooled to 1; is not; said 1 of the clean image already; is fooled, but p_1 = 5e-5 is below 0.001
    reference_clean = torch.tensor([yes, yes, no, yes])
    reference_perturbed = torch.tensor([no, yes, no, no])
    perturbed = torch.tensor([no, no, no, [10.0, 0.0]], requires_grad=True)
    batch = Batch(torch.empty(0), labels, weights)
    terms = config.unlearning_terms(batch, clean, perturbed, reference_clean, reference_perturbed)
    # −ln(1 − 3/4) = 1.386294 and −ln 0.999 = 0.0010005
    shared = 0.4 * 1.386294 + 0.1 * 0.0010005
    assert terms["shared_loss"].item() == pytest.approx(shared, rel=1e-5)
    assert terms["clean_loss"].item() == pytest.approx(0.287682, rel=1e-5)
    # −ln 1/4 of three images, and ln(1 + e⁻¹⁰) = 4.54e-5
    assert terms["adversarial_loss"].item() == pytest.approx(0.9 * 1.386294 + 0.1 * 4.54e-5, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(2 * 0.287682 + 3 * shared, rel=1e-5)
    assert terms["shared_rate"].item() == pytest.approx(0.4)
    terms["loss"].backward()
    assert perturbed.grad is not None
    assert perturbed.grad[0].tolist() == pytest.approx([3 * 0.4 * -0.75, 3 * 0.4 * 0.75], rel=1e-5)
    assert not perturbed.grad[1:].any()


def test_adversarial_training_is_the_loss_of_the_perturbed_images() -> None:
    config, preset = parse_defense("sau:adversarial-training")
    assert preset == "adversarial-training"
    assert isinstance(config, SAUConfig)
    clean, moved = torch.tensor([[LN3, 0.0]]), torch.tensor([[0.0, LN3]])
    batch = Batch(torch.empty(0), torch.tensor([0]), torch.ones(1))
    terms = config.unlearning_terms(batch, clean, moved, clean, moved)
    assert terms["loss"].item() == pytest.approx(0.287682 + 1.386294, rel=1e-5)


def plain_loss(network: nn.Module, old: nn.Module, x: torch.Tensor, delta: torch.Tensor,
               labels: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Return the paper's loss, image by image; BatchNorm, in train mode, sees x and x + δ as one batch."""
    both = torch.cat([x, x + 255 * delta])
    logits, before = network(both), old(both).argmax(1)
    loss, count = cross_entropy(logits[: len(x)], labels), len(x)
    for i in range(count):
        j = int(before[count + i])
        if j not in (int(labels[i]), int(before[i])):
            p = softmax(logits[count + i], 0)[j]
            loss = loss + (-(1 - p).log() if p > 0.001 else -math.log(0.999)) / count
    return loss


def test_a_run_is_a_plain_loop_of_adam_with_a_cosine(accelerator: Accelerator) -> None:
    network, plain, old = pixel_convnet(), pixel_convnet(), pixel_convnet()
    (phase,) = SMALL.phases(network)
    assert isinstance(phase, Phase)
    seen = noted(phase)
    Engine(accelerator, ToyImages()).run(network, [phase])
    pair = SharedPair(plain, SMALL)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for number, batch in enumerate(seen):
        # the cosine of two epochs of two steps: 1, then (1 + cos(π / 2)) / 2 = 0.5
        optimizer.param_groups[0]["lr"] = 1e-3 if number < 2 else 5e-4
        x = batch.images.float()
        delta, *_ = pair.perturbation(x, batch.labels)
        plain.train()
        optimizer.zero_grad()
        plain_loss(plain, old, x, delta, batch.labels).backward()
        optimizer.step()
    assert len(seen) == 4
    for name, tensor in plain.state_dict().items():
        # four steps of Adam go up to 3e-3; a sign that rounding turns in the search moves a few pixels
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=1e-3, atol=3e-4, msg=name)


def test_the_search_leaves_the_modes_and_the_statistics() -> None:
    pair = SharedPair(pixel_convnet(), SMALL)
    pair.train()
    pair.network.model[4].eval()  # type: ignore[index]
    modes = [module.training for module in pair.modules()]
    before = weights_of(pair)
    toys = ToyImages(6)
    assert toys.images is not None
    pair.perturbation(toys.images.float(), toys.labels)
    assert [module.training for module in pair.modules()] == modes
    assert not any(module.training for module in pair.reference.modules())
    assert equal_weights(before, weights_of(pair))
    assert all(parameter.grad is None for parameter in pair.parameters())


def test_fixed_statistics_stay(accelerator: Accelerator) -> None:
    results = []
    for fixed in (True, False):
        network = pixel_convnet()
        before = network.model[1].running_mean.clone()  # type: ignore[index]
        run(SAUConfig(epochs=1, batch_size=24, fix_statistics=fixed), network, accelerator)  # type: ignore[arg-type]
        results.append(torch.equal(before, network.model[1].running_mean))  # type: ignore[index]
    assert results == [True, False]


def test_class_weights_can_be_used(accelerator: Accelerator) -> None:
    record = run(SAUConfig(epochs=1, batch_size=16, reweight="class"), pixel_convnet(), accelerator)  # type: ignore[arg-type]
    assert "worst_class_drop" in record.history[0]


def test_seeds_and_state(accelerator: Accelerator, tmp_path: Path) -> None:
    assert_repeatable_and_tidy(SMALL, pixel_convnet, accelerator)  # type: ignore[arg-type]
    assert_resumes(SMALL, pixel_convnet, accelerator, tmp_path, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_1": "-1"}, "sau: lambda_1 must be at least 0 and finite, got -1.0"),
        ({"lambda_3": "0", "lambda_4": "0"}, "lambda_3 and lambda_4 cannot both be 0"),
        ({"lambda_1": "0", "lambda_2": "0"}, "nor lambda_1, lambda_2 and lambda_at all"),
        ({"radius": "0"}, "sau: radius must be positive and finite, got 0.0"),
        ({"norm": "l1"}, "norm must be one of linf, l2"),
    ],
)
def test_wrong_settings(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_defense("sau", settings)
