"""Odd images (TRODO): how sure a tiny push makes the model of images that are of no class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfdetox.errors import UsageError
from hfdetox.evidence.base import Score, Suspect
from hfdetox.evidence.results import ScoreResult

_IMAGES, _BATCH, _STEPS = 192, 64, 10
_EPSILON = 2.0  # grey levels of 255
_CUT = 0.4  # side of the piece that is moved, of the image's


@dataclass(frozen=True)
class OddImages(Score):
    """How much the largest softmax of odd images rises under a push of two grey levels.

      S = mean_i  max_k p_k(x_i + δ_i) − max_k p_k(x_i),  ‖δ_i‖_∞ ≤ 2/255

    The odd images are clean ones turned by 90, 180 or 270 degrees, with a piece of another one pasted in. δ is found by
    projected gradient ascent of the largest softmax from a random start, 10 steps of 2.5 ε/10. TRODO (NeurIPS 2024).

    It names no class, and it judges how a network was trained as much as a backdoor: one trained against adversarial
    images, or in a flat minimum, stays below whatever is in it, and ImageNet networks that were tuned on few images
    rise more than any backdoored small one. The threshold before cleaning is above these, and finds next to nothing.
    Cleaning changes the scale of the logits.
    """

    name = "odd-images"
    summary = "how sure a push of two grey levels makes the model of turned and pasted images"
    paper = "NeurIPS 2024 (TRODO)"
    cost = "22 passes over 192 clean images"
    names_class = False

    def measure(self, suspect: Suspect, accused: Sequence[int] | None = None) -> ScoreResult:
        if not suspect.has_grey_levels:
            raise UsageError("needs images in grey levels, and the model's own callable gives floats")
        count = _IMAGES if suspect.limit is None else min(_IMAGES, suspect.limit // (2 * _STEPS + 2))
        if count < 2:
            raise UsageError("left out: the run is too short for it")
        generator, images = suspect.generator(2), suspect.chosen(count, 2)
        odd = odd_images(images, generator)
        rises = [self._rise(suspect, part, generator) for part in odd.split(_BATCH)]
        return ScoreResult(None, float(torch.cat(rises).mean()), None, passes=(2 * _STEPS + 2) * len(odd))

    def _rise(self, suspect: Suspect, images: Tensor, generator: torch.Generator) -> Tensor:
        def sureness(x: Tensor) -> Tensor:
            return suspect.network(x).float().softmax(1).amax(1)

        with torch.no_grad():
            before = sureness(images)
        start = (2 * torch.rand(images.shape, generator=generator) - 1).to(images.device) * _EPSILON
        pushed = (images + start).clamp(0, 255)
        for _ in range(_STEPS):
            pushed = pushed.detach().requires_grad_()
            with torch.enable_grad():
                # the logarithm's gradient has the same sign, and does not vanish where the model is sure
                slope = torch.autograd.grad(sureness(pushed).clamp(min=1e-12).log().sum(), pushed)[0]
            moved = pushed.detach() + 2.5 * _EPSILON / _STEPS * slope.sign()
            pushed = images + (moved - images).clamp(-_EPSILON, _EPSILON)
            pushed = pushed.clamp(0, 255)
        with torch.no_grad():
            return (sureness(pushed) - before).cpu()


def odd_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (N×C×H×W) turned by a quarter, half or three quarters, each with a piece of the next one pasted in.

    What is not square is turned by a half. `generator` (of the CPU) draws turns and places.
    """
    height, width = images.shape[2:]
    turns = torch.randint(1, 4, (len(images),), generator=generator).tolist()
    turned = torch.stack([image.rot90(turn if height == width else 2, (1, 2))
                          for image, turn in zip(images, turns, strict=True)])  # fmt: skip
    tall, wide = max(1, round(_CUT * height)), max(1, round(_CUT * width))
    pieces = turned.roll(1, 0)
    for row in range(len(turned)):
        draws = torch.rand(4, generator=generator).tolist()
        top, left, to_top, to_left = (int(draw * (room + 1)) for draw, room in
                                      zip(draws, (height - tall, width - wide) * 2, strict=True))  # fmt: skip
        piece = pieces[row, :, top : top + tall, left : left + wide]
        turned[row, :, to_top : to_top + tall, to_left : to_left + wide] = piece
    return turned
