"""What the last layer of a classifier is given, and the least shift of it that sends every image to one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfdetox.errors import UsageError
from hfdetox.models.layers import head_layers, on_last_inputs
from hfdetox.models.network import Network, evaluating, exact_float32, uncorrected

# heads and network must give the same class on at least this share of the images
_AGREEMENT = 0.99
# of the norm of a shift, at most so much lies between what is found and what is proven to be needed
_GAP = 1e-3
_STEPS, _LOOK_EVERY, _POWER = 3000, 20, 20
# a shift that is so many times longer than any feature is none
_FAR = 100.0
# numbers of a block of differences of logits
_BLOCK = 2**23
# makes of a median absolute deviation the standard deviation of a normal distribution
_MAD = 1.4826


class NonlinearHeadError(UsageError):
    """The network's answers are not those of a linear layer of what its head is given."""


@dataclass(frozen=True)
class HeadInputs:
    """One classifier layer, Linear or 1×1 Conv2d, and what it was given for N images.

    Attributes:
        name: of the layer in the network.
        weight: K×D, float32, on the CPU, as all of it.
        bias: K; zeros where the layer has none.
        features: N×D; those of several places (pixels, tokens), whose logits the network averages, are averaged.
        labels: the true classes of the images (N, int64).
    """

    name: str
    weight: Tensor
    bias: Tensor
    features: Tensor
    labels: Tensor

    @property
    def logits(self) -> Tensor:
        """What the layer gives (N×K)."""
        return self.features @ self.weight.T + self.bias


@torch.no_grad()
def head_inputs(network: Network, images: Tensor, labels: Tensor, batch_size: int = 256) -> list[HeadInputs]:
    """Return what each layer that gives the logits is given for images, in one pass: two of a distilled model.

    Args:
        network: taken as its library loads it, in eval mode and float32; its mode and weights stay as they are.
        images: N×C×H×W as the model sees them.
        labels: N, int64.

    Raises:
        NonlinearHeadError: the answers are not those of the mean of these layers' logits.
        LayerPatternError: the model has no such layer.
    """
    names, device = head_layers(network), next(network.parameters()).device
    given: dict[str, Tensor] = {}
    features: dict[str, list[Tensor]] = {name: [] for name in names}
    answers = []
    with evaluating(network), uncorrected(network), exact_float32(), on_last_inputs(network, names, given):
        for part in images.split(batch_size):
            given.clear()
            answers.append(network(part.to(device)).float().cpu())
            for name, found in given.items():
                features[name].append(_pooled(network.get_submodule(name), found, len(part)))
    # an auxiliary head is a part of the training alone
    heads = [_head(network, name, torch.cat(parts), labels.cpu()) for name, parts in features.items() if parts]
    if heads:
        said = torch.stack([head.logits for head in heads]).mean(0).argmax(1)
        agreement = float((said == torch.cat(answers).argmax(1)).float().mean())
    if not heads or not agreement >= _AGREEMENT:
        raise NonlinearHeadError(f"the classes that the model names are not those of its head's linear layers "
                                 f"({', '.join(names)}): something that is not linear follows them")  # fmt: skip
    return heads


def bare_heads(network: Network) -> list[HeadInputs]:
    """Return the layers that give the logits, in eval mode, without any image: features are 0×D.

    Raises:
        NonlinearHeadError: one is neither Linear nor a plain 1×1 Conv2d; without images no more can be told.
        LayerPatternError: the model has no such layer.
    """
    heads = []
    for name in head_layers(network):
        width = network.get_parameter(f"{name}.weight").flatten(1).shape[1]
        heads.append(_head(network, name, torch.zeros(0, width), torch.zeros(0, dtype=torch.int64)))
    return heads


def _pooled(layer: nn.Module, given: Tensor, count: int) -> Tensor:
    """Return the mean over places of what a layer is given (N×D, on the CPU)."""
    if isinstance(layer, nn.Conv2d):
        given = given.movedim(1, -1)
    if len(given) != count or given.ndim < 2:
        raise NonlinearHeadError(f"a layer of the model's head is given {tuple(given.shape)} for {count} images")
    return given.reshape(count, -1, given.shape[-1]).float().mean(1).cpu()


def _head(network: Network, name: str, features: Tensor, labels: Tensor) -> HeadInputs:
    layer = network.get_submodule(name)
    weight: Tensor = layer.weight.detach().float().cpu().flatten(1)  # type: ignore[operator]
    wide = isinstance(layer, nn.Conv2d) and (max(layer.kernel_size) > 1 or layer.groups > 1)
    if weight.shape[1] != features.shape[1] or wide:
        raise NonlinearHeadError(f"{name} is neither a Linear nor a plain 1×1 Conv2d layer")
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().cpu()  # type: ignore[operator]
    return HeadInputs(name, weight, bias, features, labels)


def shifts_of_heads(heads: Sequence[HeadInputs]) -> list[Tensor]:
    """Return `latent_shifts` (K×D) of each head; of several, whose logits are averaged, they act together.

    The class's shift is the one of all heads' inputs side by side, and its norm that of all parts.
    """
    count = len(heads)
    shifts = latent_shifts(torch.cat([head.features for head in heads], 1),
                           torch.cat([head.weight for head in heads], 1) / count,
                           torch.stack([head.bias for head in heads]).mean(0))  # fmt: skip
    return list(shifts.split([head.weight.shape[1] for head in heads], 1))


@torch.no_grad()
def latent_shifts(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return for every class k the least vector that, added to the head's input, sends every image there.

      s_k = argmin ½‖s‖²  s.t.  (w_k − w_j)ᵀ(s + φ_i) + b_k − b_j ≥ 0  for all images i and classes j ≠ k

    The n(K−1) constraints are K−1: A s ≥ c with rows w_k − w_j and c_j = max_i z_ij − z_ik, z the logits. The dual,
    max cᵀλ − ½‖Aᵀλ‖² over λ ≥ 0, s = Aᵀλ, is solved for all classes at once by accelerated projected gradients with
    restarts, the rows scaled to unit length. Scaled up until it keeps every constraint, s is a solution whose norm the
    dual's value bounds from below: the steps end when the two are within 0.1 % for all classes.

    The quadratic programme is that of arXiv 2511.08944; that its constraints are K−1 makes it cheap.

    Args:
        features: φ, N×D. weight: K×D. bias: K.

    Returns:
        K×D, float32. The row of a class that no shift leads to (its weights lie between those of others), or only one
        100 times longer than the longest feature, is inf.
    """
    features, weight, bias = (part.double().cpu() for part in (features, weight, bias))
    longest = _FAR * max(1e-12, float(features.norm(dim=1).amax()))
    programme = _Programme(weight, _most_needed(features @ weight.T + bias), longest)
    return programme.solve().float()


def _most_needed(logits: Tensor) -> Tensor:
    """Return c: at [k, j] the most, over the images, that logit j is above logit k."""
    size = max(1, _BLOCK // logits.shape[1] ** 2)
    parts = [(part[:, None, :] - part[:, :, None]).amax(0) for part in logits.split(size)]
    needed = parts[0]
    for part in parts[1:]:
        needed = needed.maximum(part)
    return needed


class _Programme:
    """The duals of all classes: row k of every K×K tensor is class k's, and column j its constraint against class j."""

    def __init__(self, weight: Tensor, needed: Tensor, longest: float) -> None:
        """Take W (K×D), c (K×K), and the norm from which a shift counts as none."""
        self.weight, self.longest = weight, longest
        self.others = ~torch.eye(len(weight), dtype=torch.bool)
        # equal weights are no constraint that a shift could keep, and none to divide by
        self.lengths = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-12)
        self.needed = needed / self.lengths * self.others

    def shifts(self, duals: Tensor, rows: Tensor) -> Tensor:
        """Return Aᵀλ (n×D) for the λ (n×K) of n classes."""
        scaled = duals / self.lengths[rows] * self.others[rows]
        return scaled.sum(1, keepdim=True) * self.weight[rows] - scaled @ self.weight

    def gained(self, shifts: Tensor, rows: Tensor) -> Tensor:
        """Return A s (n×K), 0 in each class's own column."""
        logits = shifts @ self.weight.T
        return (logits.gather(1, rows[:, None]) - logits) / self.lengths[rows]

    def solve(self) -> Tensor:
        """Return the shifts (K×D)."""
        rows = torch.arange(len(self.weight))
        found = torch.full_like(self.weight, torch.inf)
        step = 1 / (1.05 * self._steepest(rows))
        duals = torch.zeros_like(self.needed)
        ahead, age = duals, torch.ones(len(rows), 1, dtype=duals.dtype)
        for count in range(1, _STEPS + 1):
            slope = (self.needed[rows] - self.gained(self.shifts(ahead, rows), rows)) * self.others[rows]
            moved = (ahead + step * slope).clamp(min=0)
            # momentum that points away from the slope starts anew (O'Donoghue and Candès 2015)
            wrong = (slope * (moved - duals)).sum(1, keepdim=True) < 0
            older = (1 + (1 + 4 * age.square()).sqrt()) / 2
            ahead = moved + torch.where(wrong, 0.0, (age - 1) / older) * (moved - duals)
            duals, age = moved, torch.where(wrong, 1.0, older)
            if count % _LOOK_EVERY == 0:
                found[rows], done = self._solved(duals, rows)
                left = ~done
                rows, duals, ahead, age, step = (part[left] for part in (rows, duals, ahead, age, step))
                if not len(rows):
                    break
        return found

    def _solved(self, duals: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shifts as far as they are, inf where none keeps all constraints, and which of them are done."""
        shifts, needed = self.shifts(duals, rows), self.needed[rows]
        gained = self.gained(shifts, rows)
        factors = torch.where(needed > 0, torch.where(gained > 0, needed / gained, torch.inf), 0.0)
        stretch = factors.amax(1, keepdim=True).clamp(min=1)
        # a constraint that a factor of ten does not keep is not kept at all
        kept = torch.where(stretch < 10, shifts * stretch, torch.inf)
        norm = shifts.norm(dim=1)
        least = (2 * (needed * duals).sum(1) - norm.square()).clamp(min=0).sqrt()
        most = norm * stretch[:, 0]
        exact = torch.where(norm > 0, most - least < _GAP * most, stretch[:, 0] == 1)
        none = least > self.longest
        return torch.where(none[:, None], torch.inf, kept), exact | none

    def _steepest(self, rows: Tensor) -> Tensor:
        """Return the largest eigenvalue of every class's A Aᵀ (K×1), by power iteration."""
        vectors = self.others.double()
        for _ in range(_POWER):
            vectors = self.gained(self.shifts(vectors, rows), rows) * self.others
            size = vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
            vectors = vectors / size
        return size


def robust_z(values: Tensor) -> Tensor:
    """Return (v − median) / (1.4826 · MAD) of each value, the median of an even number being the mean of two.

    What is infinite takes no part in either, and stays so. Where half of the values are equal, they are 0 and the
    others far away, but finite.
    """
    known = values[values.isfinite()].double()
    if not len(known):
        return values
    median = known.quantile(0.5)
    spread = (known - median).abs().quantile(0.5)
    return ((values.double() - median) / (_MAD * spread).clamp(min=1e-6 * max(1e-6, float(median.abs())))).float()
