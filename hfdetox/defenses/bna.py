"""BNA, correcting the distribution of neural activations (arXiv 2308.09850; Neurocomputing 614, 2025).

Triggered inputs T(x) shift the distributions of a network's activations. Undone unit by unit, they are given to their
source class again. No parameter changes: f̃ is f with a map of every norm's output, and where f says the target t, the
answer is that of f̃ (`hfdetox.models.network`). f(x) = t with f̃(x) ≠ t flags x as triggered.

This is a reconstruction. The paper's text was not at hand; the authors' code re-estimates BatchNorm's statistics on
T(X) and then moves an upper bound near 3 by at most 0.1, as no gradient reaches the statistics it means to fit. Here,
norm by norm in the model's order, the earlier ones of f̃ already mapped, each channel gets

    z' = min(σ_c (z − μ_t) / σ_t + μ_c, u)

(μ_t, σ_t) are of T(X) in f̃; (μ_c, σ_c) and the reference histogram of X in f, as in the authors' code. u minimises the
total variation Σ_bins |count_T − count_X|, bins of width 0.1 whose ends are open, over the centres of the bins and ∞:
all are tried, and of equal ones the lowest is taken (the code takes ten steps on a soft histogram). `divergence` takes
the code's alternatives to it, Jensen-Shannon's and Kullback-Leibler's, instead. LayerNorms are mapped alike, over
images and tokens.

The history's entry `bna-detection` says how well the estimated trigger's images are told from clean ones, as the code
counts it: `false_positive_rate`, the flagged share of clean images of t that f has right; `true_positive_rate`, that of
triggered images of other classes that f gives to t; and `returned_to_source`, the share of these whose answer is their
true class again. `hfdetox.models.network.flagged` flags images at test time.

T is the trigger that Neural Cleanse finds for the most suspicious class (NC's defaults; the authors invert with a
method of their own), or the one that `trigger` names, put on the images as the model sees them. Where NC flags no class
nothing is corrected. Warped and sample-specific triggers, which NC cannot express, are not corrected well.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hfdetox.defenses._histograms import DIVERGENCES, best_bound, histograms
from hfdetox.defenses._perturbed import require_pixels
from hfdetox.defenses.base import Batch, DefenseConfig, Network, Pass, Phase
from hfdetox.defenses.nc import Inversion, NCConfig
from hfdetox.errors import UsageError
from hfdetox.models.layers import classes_of
from hfdetox.models.network import Correction, UnitMap, norms_of, on_output
from hfdetox.training.search import PIXEL
from hfdetox.triggers import Trigger, parse_trigger
from hfdetox.values import Interval, NonNegativeInt, PositiveFloat, PositiveInt

_MOST_BINS = 2000
# a channel that hardly varies on triggered images is shifted and not stretched
_FLAT = 1e-5


@dataclass(frozen=True, kw_only=True)
class BNAConfig(DefenseConfig):
    """Settings of BNA.

    Attributes:
        trigger: a trigger file (or specification without commas) to correct for; empty searches one with NC.
        target: label index that `trigger` leads to; none takes the trigger's own. Without a trigger it is NC's to find.
        result: `route` asks f̃ for inputs that f gives to the target, as the paper does; the saved model is f, with
            `correction.safetensors` beside it for hfdetox. `fold` multiplies the maps, fitted without bounds (which a
            norm cannot hold), into the norms' weights: an ordinary model that is f̃ for every input.
        moments: off is an ablation: σ_c / σ_t = 1 and μ_t = μ_c, so that only the bound is left.
        bounds: off is an ablation: u = ∞.
        divergence: what u minimises: `total-variation`, or `js` or `kl` (of T(X) from X) as an ablation.
        bin_width: of the histograms, in units of the norms' outputs, positive.
        batch_size: images of a batch; changes nothing but memory.
        classes: indices of the classes NC looks at; none given is all.
        inversion_epochs: of NC, at most.
    """

    name = "bna"
    summary = "undo the shift that an estimated trigger makes in the activations; flags triggered inputs"
    paper = "arXiv 2308.09850 (Neurocomputing 614, 2025)"
    data = "clean images with labels, and a trigger file where there is one"
    cost = "two or three forward passes for each norm, after NC's search"
    card_text = ("BNA (arXiv 2308.09850) measured on {images} how {trigger} shifts the activations behind each norm, "
                 "and corrected that shift {where}. How well it tells triggered images from clean ones is in the "
                 "report's history (`bna-detection`).")  # fmt: skip
    presets: ClassVar = {
        "paper": {}, "fold": {"result": "fold"}, "js": {"divergence": "js"}, "kl": {"divergence": "kl"},
        "no-moments": {"moments": False}, "no-bounds": {"bounds": False}}  # fmt: skip

    trigger: str = ""
    target: NonNegativeInt | None = None
    result: Literal["route", "fold"] = "route"
    moments: bool = True
    bounds: bool = True
    divergence: Literal["total-variation", "js", "kl"] = "total-variation"
    bin_width: PositiveFloat = 0.1
    batch_size: Annotated[int, Interval("[2, inf]")] = 256
    classes: tuple[str, ...] = ()
    inversion_epochs: PositiveInt = 80

    def __post_init__(self) -> None:
        """Check the ranges; raises UsageError that names the setting and what it may be."""
        super().__post_init__()
        if self.target is not None and not self.trigger:
            raise UsageError("bna: target says where a trigger leads; give the trigger too, or leave both to Neural "
                             "Cleanse")  # fmt: skip
        if not self.bounds and not self.moments:
            raise UsageError("bna: moments and bounds cannot both be off, nothing would be corrected")
        if self.result == "fold" and not self.moments:
            raise UsageError("bna: result=fold folds the moments alone, and they are off; use result=route")

    @property
    def trigger_given(self) -> bool:
        return bool(self.trigger)

    def describe(self, images: str) -> str:
        trigger = "the known trigger that it was given" if self.trigger else "a trigger that it estimated"
        where = "beside the weights, which it did not change" if self.result == "route" else "in the norms' weights"
        return super().describe(images).replace("{trigger}", trigger).replace("{where}", where)

    def efforts(self, images: int, classes: int) -> tuple[float, ...]:
        if self.trigger:
            return super().efforts(images, classes)
        nc = self._search()
        return tuple(nc.searched(images, classes, epochs) for epochs in (nc.patience, nc.inversion_epochs))

    def _search(self) -> NCConfig:
        return NCConfig(classes=self.classes, inversion_epochs=self.inversion_epochs, batch_size=self.batch_size)

    def phases(self, network: Network) -> list[Phase | Pass]:
        require_pixels(network, self.name)
        if self.trigger:
            trigger, count = parse_trigger(self.trigger), classes_of(network.model)
            named = trigger.target if self.target is None else self.target
            if not isinstance(named, int):
                raise UsageError(f"bna: trigger {trigger.name} has the target {named!r}; give its label's index with "
                                 "--set target=N")  # fmt: skip
            if named >= count:
                raise UsageError(f"bna: this model has the classes 0 to {count - 1}; the trigger's target is {named}")
            return [*BNA(network, self, trigger=trigger, target=named).passes()]
        # without the unlearning, which would train the weights
        inversion, search = self._search().search(network)
        return [*search, *BNA(network, self, inversion=inversion).passes()]


class BNA:
    """What the passes find out, and f̃.

    Args:
        network: is measured; given its correction, or folded, by the last pass.
        trigger: with `target`, what stands for T; without, `inversion` is asked once it has a verdict.

    Raises:
        UsageError: the network has no affine norms, or, for `fold`, a norm without a shift.
    """

    def __init__(self, network: Network, config: BNAConfig, *, trigger: Trigger | None = None, target: int = -1,
                 inversion: Inversion | None = None) -> None:  # fmt: skip
        self.network, self.config = network, config
        self.trigger, self.inversion = trigger, inversion
        self.bounds = config.bounds and config.result == "route"
        self.norms = norms_of(network.model)
        if not self.norms:
            raise UsageError(f"bna: {type(network.model).__name__} has no norm with a scale a channel, whose output "
                             "could be corrected; use another defense")  # fmt: skip
        for name in self.norms if config.result == "fold" else []:
            if not isinstance(getattr(network.model.get_submodule(name), "bias", None), nn.Parameter):
                raise UsageError(f"bna: norm {name} has no shift to fold the correction into; use result=route")
        # a target of −1 says that there is nothing to correct; of each norm NAME.mean, .clean, .scale and so on
        self.found: dict[str, Tensor] = {"target": torch.tensor(target), "done": torch.tensor(0)}
        self._sums: dict[str, Tensor] = {}
        self._ends: dict[str, Tensor] = {}

    @property
    def target(self) -> int:
        """The target's label index, −1 where there is nothing to correct."""
        return int(self.found["target"])

    def passes(self) -> list[Pass]:
        """Return the passes in their order."""
        passes = [self._measuring("bna-moments", self._moments, self._keep_clean_moments)]
        passes[0].start = self.begin
        if self.bounds:
            passes.append(self._measuring("bna-histograms", self._histogram, self._keep_clean_histogram))
        for name in self.norms:
            if self.config.moments:
                passes.append(self._measuring("bna-map", self._moments, self._keep_map, name))
            if self.bounds:
                passes.append(self._measuring("bna-bound", self._histogram, self._keep_bound, name))
        return [*passes, self._pass("bna-detection", self._see_detection, self._finish)]

    def begin(self) -> None:
        """Take the trigger that NC found, if it was to look for one."""
        self.network.correction = None
        if self.inversion is None or not bool(self.inversion.flagged.any()):
            return
        norms = self.inversion.best_norm.masked_fill(~self.inversion.flagged, math.inf)
        row = int(norms.argmin())
        self.found |= {"target": self.inversion.classes[row].cpu(), "mask": self.inversion.best_masks[row].cpu(),
                       "pattern": self.inversion.best_patterns[row].cpu()}  # fmt: skip

    def triggered(self, images: Tensor) -> Tensor:
        """Return T(x) of images (uint8, N×C×H×W): uint8 by a trigger, else float32 in 0 to 255."""
        if self.trigger is not None:
            return self.trigger.apply(images)
        mask, pattern = (self.found[name].to(images.device) for name in ("mask", "pattern"))
        return ((1 - mask) * images.float() + PIXEL * mask * pattern).clamp(0, PIXEL)

    def correction(self) -> Correction:
        """Return the maps found so far."""
        parts = ("scale", "shift", "bound")
        return Correction(self.target, {name: UnitMap(*(self.found[f"{name}.{part}"] for part in parts))
                                        for name in self.norms if f"{name}.scale" in self.found})  # fmt: skip

    def _pass(self, name: str, on_batch: Callable[[nn.Module, Batch], None],
              finish: Callable[[Accelerator], Mapping[str, float]]) -> Pass:  # fmt: skip
        """Return a pass that does nothing where there is nothing to correct."""

        def look(network: nn.Module, batch: Batch) -> None:
            if self.target >= 0:
                on_batch(network, batch)

        def end(accelerator: Accelerator) -> Mapping[str, float]:
            found = finish(accelerator) if self.target >= 0 else {"corrected": 0.0}
            self._sums.clear()
            return found

        return Pass(name=name, on_batch=look, finish=end, batch_size=self.config.batch_size, state=self)

    def _measuring(self, title: str, measure: Callable[[str, Tensor], Tensor],
                   keep: Callable[[Accelerator, str, Tensor], dict[str, Tensor]], norm: str = "") -> Pass:  # fmt: skip
        """Return a pass over the clean images and all norms of f, or over the triggered ones and one norm of f̃.

        `measure` gives what is added up over the batches of the outputs of a norm (C×M float32), and `keep`, in the
        end, what is found of it.
        """
        names = [norm] if norm else self.norms

        def on_batch(network: nn.Module, batch: Batch) -> None:
            with ExitStack() as stack:
                if norm:
                    stack.enter_context(self.correction().applied(self.network.model))
                for name in names:

                    def note(output: Tensor, axis: int, name: str = name) -> None:
                        self._add(name, measure(name, output.detach().float().movedim(axis, 0).flatten(1)))

                    # its hook runs after that of the map
                    stack.enter_context(on_output(self.network.model.get_submodule(name), note))
                network(self.triggered(batch.images) if norm else batch.images)

        def finish(accelerator: Accelerator) -> Mapping[str, float]:
            for name in names:
                found = keep(accelerator, name, _summed(self._sums[name], accelerator))
                self.found |= {f"{name}.{part}": value for part, value in found.items()}
            return {}

        return self._pass(f"{title} {norm}".strip(), on_batch, finish)

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def _moments(self, name: str, values: Tensor) -> Tensor:
        variance, mean = (part.cpu().double() for part in torch.var_mean(values, dim=1, correction=0))
        count = torch.full_like(mean, values.shape[1])
        ends = torch.stack([values.amin(), -values.amax()]).cpu()
        self._ends[name] = self._ends.get(name, ends).minimum(ends)
        return torch.stack([count, count * mean, count * (variance + mean.square())])

    def _histogram(self, name: str, values: Tensor) -> Tensor:
        low, bins = float(self.found[f"{name}.low"]), int(self.found[f"{name}.bins"])
        return histograms(values, low, self.config.bin_width, bins).cpu()

    def _keep_clean_moments(self, accelerator: Accelerator, name: str, total: Tensor) -> dict[str, Tensor]:
        width, (mean, deviation) = self.config.bin_width, moments(total)
        ends = accelerator.gather(self._ends[name][None].to(accelerator.device)).amin(0).cpu()
        low = math.floor(float(ends[0]) / width) * width
        bins = min(_MOST_BINS, math.floor((-float(ends[1]) - low) / width) + 1)
        return {"mean": mean, "deviation": deviation, "low": torch.tensor(low), "bins": torch.tensor(bins)}

    def _keep_clean_histogram(self, accelerator: Accelerator, name: str, total: Tensor) -> dict[str, Tensor]:
        return {"clean": total.float()}

    def _keep_map(self, accelerator: Accelerator, name: str, total: Tensor) -> dict[str, Tensor]:
        mean, deviation = self.found[f"{name}.mean"], self.found[f"{name}.deviation"]
        scale, shift = (part.float() for part in matching_map(mean, deviation, *moments(total)))
        return {"scale": scale, "shift": shift, "bound": torch.full_like(scale, math.inf)}

    def _keep_bound(self, accelerator: Accelerator, name: str, total: Tensor) -> dict[str, Tensor]:
        low, clean = float(self.found[f"{name}.low"]), self.found[f"{name}.clean"].double()
        bound, _ = best_bound(total, clean, low, self.config.bin_width, DIVERGENCES[self.config.divergence])
        ones = torch.ones(len(bound))
        unmoved = {} if self.config.moments else {"scale": ones, "shift": torch.zeros_like(ones)}
        return {**unmoved, "bound": bound.float()}

    def _see_detection(self, network: nn.Module, batch: Batch) -> None:
        """Count, of clean target images that f has right, those flagged; of triggered others that f gives to t, too."""
        correction, t = self.correction(), self.target
        counts = []
        for images, wanted in ((batch.images, batch.labels == t), (self.triggered(batch.images), batch.labels != t)):
            hit = (network(images).argmax(1) == t) & wanted
            with correction.applied(self.network.model):
                corrected = network(images).argmax(1)
            counts += [hit.sum(), (hit & (corrected != t)).sum(), (hit & (corrected == batch.labels)).sum()]
        self._add("counts", torch.stack(counts).cpu())

    def _finish(self, accelerator: Accelerator) -> Mapping[str, float]:
        """Give the network its correction; return how well the estimated trigger's images are told and given back."""
        clean, flagged, _, led, caught, returned = _summed(self._sums["counts"], accelerator).tolist()
        self.found["done"] = torch.tensor(1)
        self._give()
        if self.config.result == "fold":
            fold(self.network.model, self.correction())
        led = max(1.0, led)
        return {"corrected": 1.0, "target": float(self.target), "false_positive_rate": flagged / max(1.0, clean),
                "true_positive_rate": caught / led, "returned_to_source": returned / led}  # fmt: skip

    def _give(self) -> None:
        if self.config.result == "route":
            self.network.correction = self.correction()

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything found so far."""
        return dict(self.found)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what a stopped run found."""
        self.found = dict(state)
        if int(self.found["done"]):
            self._give()


def moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C each) of the number, the sum and the sum of squares of values (3×C)."""
    count, total, squares = sums
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()


def matching_map(mean: Tensor, deviation: Tensor, seen_mean: Tensor, seen_deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) that take a channel of the seen mean and deviation to the wanted ones (C each).

    A seen deviation near 0 is not stretched.
    """
    scale = torch.where(seen_deviation > _FLAT, deviation / seen_deviation.clamp_min(_FLAT), 1.0)
    return scale, mean - scale * seen_mean


@torch.no_grad()
def fold(model: nn.Module, correction: Correction) -> None:
    """Multiply the maps into the norms: γ ← s γ, β ← s β + b; the bounds are left out."""
    for name, unit_map in correction.maps.items():
        norm = model.get_submodule(name)
        weight, bias = norm.get_parameter("weight"), norm.get_parameter("bias")
        scale, shift = unit_map.scale.to(weight.device), unit_map.shift.to(weight.device)
        bias.copy_(scale * bias + shift)
        weight.mul_(scale)


def _summed(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the sum of a tensor over the processes, on the CPU in float64."""
    if accelerator.num_processes == 1:
        return values.double()
    found: Tensor = accelerator.reduce(values.float().to(accelerator.device), reduction="sum")
    return found.cpu().double()
