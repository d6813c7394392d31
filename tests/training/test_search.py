"""The search of triggers: against plain loops in PyTorch, several classes against each alone, and a backdoor found."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from hfdetox.training import search
from hfdetox.training.search import Stamps, search_blends, search_patches, success_counts
from tests.defenses.pixels import corner_backdoored, linear, pixel_convnet, pixels
from tests.tiny_training import ToyImages, weights_of

FOUR = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.5]]


def drawn(seed: int = 0) -> torch.Generator:
    """Return a fresh generator."""
    return torch.Generator().manual_seed(seed)


def toys(count: int = 96, side: int = 8, seed: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Return toy images and labels."""
    found = ToyImages(count, side, seed=seed)
    assert found.images is not None
    return found.images, found.labels


def test_a_blend_is_that_of_a_plain_loop() -> None:
    network, images = linear(FOUR), pixels((0.2, 0.9), (0.7, 0.1), (0.4, 0.4), (0.9, 0.9))
    found = search_blends(network, images, [3], alpha=0.3, generator=drawn(5), steps=4, batch_size=3)
    free, generator = torch.zeros(1, 1, 2, requires_grad=True), drawn(5)
    adam = torch.optim.Adam([free], lr=0.15)
    for _ in range(4):
        x = images[torch.randperm(4, generator=generator)[:3]]
        adam.zero_grad()
        cross_entropy(network(0.7 * x + 0.3 * 255 * free.sigmoid()), torch.full((3,), 3)).backward()
        adam.step()
    torch.testing.assert_close(found.patterns[0], free.detach().sigmoid())
    assert found.masks.flatten().tolist() == pytest.approx([0.3])
    assert (found.classes, found.passes) == ((3,), 2 * 4 * 3)


def test_a_patch_is_that_of_a_plain_loop() -> None:
    network, images = linear(FOUR), pixels((0.2, 0.9), (0.7, 0.1), (0.4, 0.4), (0.9, 0.9))
    found = search_patches(network, images, [1], generator=drawn(5), steps=4, batch_size=3, kappa=0.01)
    mask, pattern = (torch.ones(1, 1, 2, requires_grad=True) for _ in range(2))
    adam, generator = torch.optim.Adam([mask, pattern], lr=0.1, betas=(0.5, 0.9)), drawn(5)
    for _ in range(4):
        x = images[torch.randperm(4, generator=generator)[:3]]
        m, q = mask.tanh() / 2 + 0.5, pattern.tanh() / 2 + 0.5
        adam.zero_grad()
        # κ at 1×2 pixels is 32²/2 times that at 32×32
        loss = cross_entropy(network((1 - m) * x + m * 255 * q), torch.full((3,), 1)) + 0.01 * 512 * m.sum()
        loss.backward()
        adam.step()
    torch.testing.assert_close(found.masks[0], mask.detach().tanh() / 2 + 0.5)
    torch.testing.assert_close(found.patterns[0], pattern.detach().tanh() / 2 + 0.5)


@pytest.mark.parametrize("together", [1024, 1])
@pytest.mark.parametrize("kind", ["patch", "blend"])
def test_many_classes_together_give_what_each_gives_alone(
    kind: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, (images, _) = pixel_convnet(), toys()

    def found(classes: list[int]) -> Stamps:
        if kind == "patch":
            return search_patches(network, images, classes, generator=drawn(), steps=5, batch_size=16)
        return search_blends(network, images, classes, alpha=0.1, generator=drawn(), steps=5, batch_size=16)

    alone = [found([label]) for label in (2, 0)]
    monkeypatch.setattr(search, "TOGETHER", together)
    both = found([2, 0])
    torch.testing.assert_close(both.masks, torch.cat([one.masks for one in alone]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(both.patterns, torch.cat([one.patterns for one in alone]), rtol=1e-3, atol=1e-4)


def test_the_patch_of_a_backdoor_is_small_and_leads_other_images_too() -> None:
    network, (images, _) = corner_backdoored(), toys()
    before = weights_of(network)
    with torch.no_grad():
        found = search_patches(network, images, [0, 1, 2], generator=drawn())
    norms = found.norms(8, 8)
    # a corner of 9 of 64 pixels
    assert norms[0] < 10
    assert norms[0] < 0.6 * norms[1:].min()
    held, held_labels = toys(seed=12)
    hits, counts = success_counts(network, held, held_labels, found)
    assert counts.tolist() == [64, 64, 64]
    assert hits[0] > 60
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(network).items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("side", [96, 40])
def test_large_images_are_searched_on_a_coarse_grid_that_is_resized_as_triggers_are(side: int) -> None:
    network, (images, _) = pixel_convnet(), toys(8, side)
    patch = search_patches(network, images, [1], generator=drawn(), steps=2, batch_size=4)
    blend = search_blends(network, images, [1], alpha=0.2, generator=drawn(), steps=2, batch_size=4)
    assert patch.masks.shape == (1, 1, min(side, 64), min(side, 64))
    assert (blend.patterns.shape, blend.masks.shape) == ((1, 3, 32, 32), (1, 1, 1, 1))
    whole = interpolate(patch.masks, size=(side, side), mode="bilinear")
    assert patch.norms(side, side).item() == pytest.approx(float(whole.sum()), rel=1e-5)


def test_success_is_counted_on_images_of_other_labels_with_whole_grey_levels() -> None:
    # class 1 wins where the second pixel is above the first; half a grey level does not count
    network = linear([[1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[10, 10], [20, 10], [200, 10], [5, 6]], dtype=torch.uint8).view(4, 1, 1, 2)
    masks, patterns = torch.tensor([[[[0.0, 0.1]]]]), torch.tensor([[[[0.0, 0.44]]]])
    # the second pixel becomes 9 + 11.22 = 20.22, truncated to 20
    hits, counts = success_counts(network, images, torch.tensor([0, 0, 0, 1]), Stamps((1,), masks, patterns, 0))
    assert (hits.tolist(), counts.tolist()) == ([1], [3])
