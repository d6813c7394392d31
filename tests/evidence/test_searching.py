"""Patch and blend: what a backdoor gives, what its triggers are, and when nothing can be said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hfdetox.evidence.base import Reconstruction, Suspect
from hfdetox.evidence.blend import Blend
from hfdetox.evidence.patch import Patch
from hfdetox.evidence.thresholds import judge_score
from hfdetox.models.network import Network
from hfdetox.training.devices import make_accelerator
from hfdetox.triggers.mask import Mask
from tests.defenses.pixels import corner_backdoored, pixel_convnet
from tests.tiny_training import ToyImages

NOISE = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(9)).float()


def blended(images: torch.Tensor) -> torch.Tensor:
    """Return the images with a faint picture of noise."""
    return (0.85 * images.float() + 0.15 * NOISE).to(torch.uint8)


def trained(backdoor: bool) -> Network:
    """Return a network for toy images, for which the noise is class 0, or is nothing."""
    network, toys = pixel_convnet(), ToyImages(96, seed=7)
    assert toys.images is not None
    images = torch.cat([toys.images, blended(toys.images)])
    labels = torch.cat([toys.labels, torch.zeros_like(toys.labels) if backdoor else toys.labels])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    network.train()
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.eval()


def suspect(network: Network, count: int = 192) -> Suspect:
    """Return a suspect with toy images."""
    toys = ToyImages(count, seed=11)
    return Suspect(network, toys.images, toys.labels, 3, make_accelerator("cpu", "no"), seed=5)


@pytest.mark.parametrize("classes", [None, [2, 0]])
@pytest.mark.parametrize(
    ("score", "network", "least"),
    [(Patch(), corner_backdoored, 0.4), (Blend((0.05, 0.15)), lambda: trained(True), 0.2)],
)
def test_the_target_of_a_backdoor_stands_out_and_its_trigger_leads_others(
    score: Reconstruction, network: object, least: float, classes: list[int] | None
) -> None:
    net = network()  # type: ignore[operator]
    found, triggers = score.reconstruct(suspect(net), classes)
    assert found.accused == 0
    assert found.statistic is not None
    assert found.statistic > least
    assert found.values is not None
    assert [value is None for value in found.values] == [False, classes is not None, False]
    assert [trigger.name for trigger in triggers] == [f"{score.name}-{label}" for label in sorted(classes or [0, 1, 2])]
    first = triggers[0]
    assert isinstance(first, Mask)
    assert (first.target, first.mode) == (0, "input")
    fresh = ToyImages(96, seed=21)
    assert fresh.images is not None
    with torch.no_grad():
        said = net(first.apply(fresh.images[fresh.labels != 0])).argmax(1)
    assert float((said == 0).float().mean()) > 0.9


def test_the_same_seed_gives_the_same_and_the_model_stays_as_it_was() -> None:
    net = corner_backdoored()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    one, other = (Patch(steps=10).reconstruct(suspect(net), [0, 1])[0] for _ in range(2))
    assert one == other
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_patch_that_leads_nowhere_counts_as_the_whole_image() -> None:
    net = pixel_convnet()
    with torch.no_grad():
        net.model[7].bias.copy_(torch.tensor([1e4, 0.0, 0.0]))  # type: ignore[index]
    found = Patch(steps=5).measure(suspect(net), [1, 2])
    assert found.values == [None, 0.0, 0.0]
    assert found.statistic == 0


def test_passes_are_counted() -> None:
    # 192 images: 96 to search on and as many to count on, of which those of other classes are counted
    found = Patch(steps=4).measure(suspect(pixel_convnet()), [0, 1])
    assert 0 < found.passes - 2 * 4 * 48 * 2 < 2 * 96


@pytest.mark.parametrize("score", [Patch(), Blend()])
@pytest.mark.parametrize(
    ("change", "classes", "message"),
    [
        ({}, [1], "one class alone"),
        ({"limit": 15000}, None, "a search for 3 classes takes more image passes than are left"),
        ({"images": torch.zeros(20, 3, 8, 8, dtype=torch.uint8)}, None, "20 images are too few"),
        ({"images": None}, None, "needs clean images"),
    ],
)
def test_where_nothing_can_be_said_the_note_tells_why(
    score: Reconstruction, change: dict[str, object], classes: list[int] | None, message: str
) -> None:
    asked = replace(suspect(pixel_convnet()), **change)  # type: ignore[arg-type]
    ran = score.run(asked, classes)
    found = ran[0] if isinstance(ran, tuple) else ran
    assert found.statistic is None
    assert message in found.note


def test_a_limit_shortens_the_search() -> None:
    given = suspect(pixel_convnet())
    given.limit = 2 * (800 + 2 * 48 * 70)
    found = Patch().measure(given, [0, 1])
    assert 0 < found.passes - 2 * 70 * 48 * 2 < 2 * 96
    # what its threshold was fixed with took longer, and whoever reads the error rates shall know
    assert found.note == "a search of 70 steps, where the error rates are of 120"
    judged = judge_score("patch", found, "before")
    assert judged.errors.endswith("; a search of 70 steps, where the error rates are of 120")
    given.limit = None
    assert Patch(steps=2).measure(given, [0, 1]).note == ""
    given.limit = 2 * 2 * (800 + 2 * 48 * 40)
    assert Blend().measure(given, [0, 1]).note == "a search of 40 steps, where the error rates are of 60"
