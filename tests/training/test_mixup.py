"""Images blended in pairs."""

import torch

from hfdetox.training.batches import Batch
from hfdetox.training.mixup import mixed


def made() -> Batch:
    images = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    return Batch(images, torch.arange(6), torch.full((6,), 1 / 6))


def test_no_alpha_gives_the_images_as_they_are_and_draws_nothing() -> None:
    batch = made()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    (images,) = mixed(batch, 0.0)
    assert images is batch.images
    assert torch.equal(before, torch.get_rng_state())


def test_pairs_share_as_said() -> None:
    batch = made()
    torch.manual_seed(0)
    images, labels, share = mixed(batch, 0.2)
    assert 0 <= share <= 1
    assert sorted(labels.tolist()) == sorted(batch.labels.tolist())
    torch.manual_seed(0)
    float(torch.distributions.Beta(0.2, 0.2).sample())
    others = torch.randperm(len(batch.labels))
    torch.testing.assert_close(images, share * batch.images.float() + (1 - share) * batch.images[others].float())
    assert torch.equal(labels, batch.labels[others])
