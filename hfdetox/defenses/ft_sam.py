"""FT-SAM, fine-tuning with sharpness-aware minimisation (Zhu et al., ICCV 2023, arXiv 2304.11823).

    min over w of  max over ‖T⁻¹ e‖₂ ≤ ρ of  L(w + e),    T = diag |w|

One step: g = ∇L(w), e = ρ · T² g / ‖T g‖₂, and SGD on w with the gradient ∇L(w + e), for which BatchNorm's running
statistics stay those of the first pass. Neurons of a backdoor tend to have large weights, and T perturbs just these.
T covers every trained parameter, those of norms and biases too. The authors' benchmark steps its cosine every batch;
here it is stepped every epoch.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from hfdetox.defenses.base import Batch, Network, Pass, Phase, TuningConfig, trained_parameters
from hfdetox.training.sharpness import SharpnessAware
from hfdetox.values import Interval, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class FTSAMConfig(TuningConfig):
    """Settings of FT-SAM; the defaults are the paper's for CIFAR-10 (preset `cifar`).

    Attributes:
        rho: radius ρ of the perturbation, above 0: 2, or 8 for GTSRB and Tiny ImageNet (preset `gtsrb-tiny`), where the
            benchmark trains GTSRB for 50 epochs; start with 0.5 to 2 for a ViT.
        label_smoothing: share of the target that goes to the other classes, in equal parts; in [0, 1).
    """

    name = "ft-sam"
    summary = "fine-tune with the gradient taken where a perturbation of the weights hurts most"
    paper = "arXiv 2304.11823 (ICCV 2023)"
    cost = "2"
    times = 2.0
    card_text = ("FT-SAM (arXiv 2304.11823) fine-tuned the model on {images} with sharpness-aware minimisation, which "
                 "perturbs large weights most.")  # fmt: skip
    presets: ClassVar = {"cifar": {}, "gtsrb-tiny": {"rho": 8.0, "label_smoothing": 0.0}}

    weight_decay: float = 5e-4
    rho: PositiveFloat = 2.0
    label_smoothing: Annotated[float, Interval("[0, 1)")] = 0.1

    def phases(self, network: Network) -> list[Phase | Pass]:
        return [self.phase(name="ft-sam", parameters=trained_parameters(network), loss=self._loss,
                           sharpness=SharpnessAware(rho=self.rho, adaptive=True))]  # fmt: skip

    def _loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch.images)
        loss = batch.cross_entropy(logits, smoothing=self.label_smoothing)
        return {"loss": loss, "clean_loss": batch.cross_entropy(logits.detach())}
