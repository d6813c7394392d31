"""Distillation: what a model says of an image, held to what a teacher says of it (Hinton et al., arXiv 1503.02531)."""

import copy

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from hfdetox.models.network import Network

TEMPERATURE = 2.0


class Teacher:
    """A network as it is when this is made, whatever happens to it afterwards: it is copied, and never trained.

    A resumed run makes its teacher before the weights of the stopped one are loaded, so that it is the same.
    """

    def __init__(self, network: Network) -> None:
        try:
            self.network = copy.deepcopy(network).eval()
        except RuntimeError:
            # weights that a hook computes (weight_norm's) can be copied once they were computed without gradients
            parameter = next(network.parameters())
            with torch.no_grad():
                network(torch.zeros(1, *network.input_size, device=parameter.device))
            self.network = copy.deepcopy(network).eval()

    def divergence(self, images: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
        """Return τ² Σ wᵢ KL(p_teacher ‖ p) of softened answers, 0-d, float32, with τ = 2.

        Args:
            images: what the teacher is asked about (N×C×H×W, 0 to 255).
            logits: what the trained network says (N×K, any float dtype).
            weights: wᵢ of the images (N), of sum 1 over a batch.
        """
        if next(self.network.parameters()).device != images.device:
            self.network.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = (self.network(images).float() / TEMPERATURE).log_softmax(1)
            apart = kl_div((logits.float() / TEMPERATURE).log_softmax(1), wanted, reduction="none", log_target=True)
            return TEMPERATURE**2 * (weights * apart.sum(1)).sum()
