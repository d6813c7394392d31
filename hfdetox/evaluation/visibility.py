"""How visible a trigger is: what it changed in the images as the model sees them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hfdetox.data.cache import Pixels
from hfdetox.evaluation.results import Visibility

_BATCH = 256


@torch.inference_mode()
def measure_visibility(clean: Pixels, view: Pixels) -> Visibility:
    """Compare every triggered image with its clean one, as prepared for the model (uint8, 0 to 255).

    The peak signal-to-noise ratio of an image is 10·log10(255² / MSE) dB, its MSE taken over all pixels and channels;
    the mean is over the images that changed, for those that did not have none. It is computed where the caches are;
    without a cache both images are decoded anew.

    Args:
        clean: the images without a trigger.
        view: triggered copies of some or all of them.

    Raises:
        ValueError: images that are not uint8 (a callable's own floats), for which a grey level means nothing.
    """
    if view.preprocessing.dtype != torch.uint8:
        raise ValueError(f"visibility is measured in grey levels of uint8 images, got {view.preprocessing.dtype}")
    parts = []
    for before, triggered in _pairs(clean, view):
        change = (triggered.float() - before.float()).flatten(1)
        parts.append(torch.stack([change.square().mean(1), change.abs().amax(1)], 1))
    # the only wait for the device
    errors, largest = torch.cat(parts).cpu().double().unbind(1)
    changed = largest > 0
    ratios = 10 * torch.log10(255**2 / errors[changed])
    return Visibility(
        psnr=float(ratios.mean()) if changed.any() else None,
        max_change=int(largest.max()),
        changed=float(changed.double().mean()),
    )


def changes_pixels(clean: Pixels, view: Pixels) -> bool:
    """Tell whether any image of the view differs from its clean one; looks no further than the first batch that does.

    It also takes images that are a callable's own floats.
    """
    return any(not torch.equal(before, triggered) for before, triggered in _pairs(clean, view))


def _pairs(clean: Pixels, view: Pixels) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the clean and the triggered images of each batch of the view, on the view's device."""
    place = {position: item for item, position in enumerate(clean.positions.tolist())}
    for positions, triggered, _ in view.batches(_BATCH):
        _, before, _ = clean.__getitems__([place[position] for position in positions.tolist()])
        yield before.to(triggered.device), triggered
