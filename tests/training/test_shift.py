"""The latent shift against a general solver, and what heads of every kind are given."""

import numpy as np
import pytest
import timm
import torch
from scipy.optimize import minimize, nnls
from torch import nn

from hfdetox.models.classifier import load_classifier
from hfdetox.models.layers import head_layers
from hfdetox.models.network import Network
from hfdetox.training.shift import NonlinearHeadError, head_inputs, latent_shifts, robust_z, shifts_of_heads
from tests.tiny_models import make_folder, pixels_for, timm_model


def _problem(classes: int, width: int, images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(classes, width, generator=generator), torch.randn(classes, generator=generator) / 4
    return torch.randn(images, width, generator=generator).relu(), weight, bias


def _by_nnls(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int) -> np.ndarray:
    """Solve the least-distance problem with SciPy (Lawson and Hanson's LDP): min ‖s‖, A s ≥ c, every constraint."""
    phi, w, b = (part.double().numpy() for part in (features, weight, bias))
    rows, needed = [], []
    for j in range(len(w)):
        for x in phi:
            if j != k:
                rows.append(w[k] - w[j])
                needed.append((w[j] - w[k]) @ x + b[j] - b[k])
    system = np.vstack([np.array(rows).T, np.array(needed)])
    found, _ = nnls(system, np.append(np.zeros(w.shape[1]), 1.0))
    left = system @ found - np.append(np.zeros(w.shape[1]), 1.0)
    return -left[:-1] / left[-1]


@pytest.mark.parametrize(("classes", "width"), [(2, 3), (4, 3), (6, 12), (10, 40)])
def test_the_shift_is_that_of_a_general_solver(classes: int, width: int) -> None:
    features, weight, bias = _problem(classes, width, 15)
    found = latent_shifts(features, weight, bias)
    for k in range(classes):
        if found[k].isfinite().all():
            expected = _by_nnls(features, weight, bias, k)
            assert np.linalg.norm(found[k]) == pytest.approx(np.linalg.norm(expected), rel=2e-3, abs=1e-5)
            np.testing.assert_allclose(found[k], expected, atol=0.06 * np.linalg.norm(expected) + 1e-4)


def test_the_shift_is_that_of_slsqp_and_sends_every_image_to_its_class() -> None:
    features, weight, bias = _problem(5, 8, 30, seed=3)
    found = latent_shifts(features, weight, bias)
    phi, w, b = (part.double().numpy() for part in (features, weight, bias))
    for k in range(5):
        logits = (features + found[k]) @ weight.T + bias
        assert (logits[:, k] >= logits.amax(1) - 1e-4).all()
        kept = [{"type": "ineq", "fun": lambda s, x=x, j=j, k=k: (w[k] - w[j]) @ (s + x) + b[k] - b[j]}
                for x in phi for j in range(5) if j != k]  # fmt: skip
        expected = minimize(lambda s: s @ s / 2, found[k].double().numpy() * 1.2, jac=lambda s: s, constraints=kept).x
        assert float(found[k].norm()) == pytest.approx(np.linalg.norm(expected), rel=2e-3)


def test_a_class_that_no_shift_leads_to_is_infinite() -> None:
    weight = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [0.1, 0.1]])
    found = latent_shifts(torch.randn(20, 2), weight, torch.zeros(5))
    assert found[:4].isfinite().all()
    assert found[4].isinf().all()
    # nor to one of two classes with equal weights, unless it is ahead everywhere
    found = latent_shifts(torch.randn(20, 2), torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([0.0, 1, 0]))
    assert found[0].isinf().all()
    assert found[1].isfinite().all()


def test_no_shift_is_needed_where_every_image_is_of_the_class_already() -> None:
    found = latent_shifts(torch.ones(4, 3), torch.tensor([[1.0, 1, 1], [0, 0, 0], [-1, 0, 0]]), torch.zeros(3))
    assert found[0].norm() == 0
    assert found[1].norm() > 0


@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
def test_the_scale_of_the_weights_changes_nothing_but_the_shift(scale: float) -> None:
    features, weight, bias = _problem(7, 20, 40)
    plain = latent_shifts(features, weight, bias)
    torch.testing.assert_close(latent_shifts(features, weight * scale, bias * scale), plain, rtol=0.02, atol=1e-3)
    scaled = latent_shifts(features * scale, weight, bias * scale)
    torch.testing.assert_close(scaled / scale, plain, rtol=0.02, atol=1e-3)


def test_hundreds_of_classes_are_solved_at_once() -> None:
    features, weight, bias = _problem(300, 64, 100)
    found = latent_shifts(features, weight, bias)
    chosen = [0, 149, 299]
    for k in chosen:
        logits = (features + found[k]) @ weight.T + bias
        assert (logits[:, k] >= logits.amax(1) - 1e-2).all()


@pytest.mark.parametrize("kind", ["timm/resnet", "timm/vit", "timm/convnext", "transformers/deit-teacher",
                                  "transformers/levit-teacher", "transformers/resnet"])  # fmt: skip
def test_heads_of_every_kind_are_given_what_makes_the_logits(kind: str, tmp_path) -> None:
    classifier = load_classifier(make_folder(tmp_path / "model", kind))
    images = pixels_for(classifier)
    heads = head_inputs(classifier.network, images, torch.tensor([0, 1, 2]), batch_size=2)
    assert len(heads) == len(head_layers(classifier.network)) == (2 if "teacher" in kind else 1)
    with torch.no_grad():
        logits = classifier.network(images)
        torch.testing.assert_close(sum(head.logits for head in heads) / len(heads), logits, rtol=1e-4, atol=1e-4)
        shifts = shifts_of_heads(heads)
        # the shift, added to what the heads are given inside the network, sends every image to its class
        for k in range(logits.shape[1]):
            if not shifts[0][k].isfinite().all():
                continue
            hooks = []
            for head, shift in zip(heads, shifts, strict=True):
                add = shift[k] * 1.001
                hooks.append(classifier.network.get_submodule(head.name).register_forward_pre_hook(
                    lambda module, inputs, add=add: (inputs[0] + add,)))  # fmt: skip
            moved = classifier.network(images)
            for hook in hooks:
                hook.remove()
            assert (moved[:, k] >= moved.amax(1) - 1e-3).all()


class _Deep(nn.Module):
    """An MLP head, or one whose logits are bent afterwards, on pooled or on unpooled features."""

    def __init__(self, head: nn.Module, *, pooled: bool, after: nn.Module) -> None:
        super().__init__()
        self.image_size = 8
        self.body, self.pooled = nn.Conv2d(3, 6, 3), pooled
        self.head, self.after = head, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        if self.pooled:
            x = x.mean((2, 3), keepdim=isinstance(self.head, nn.Conv2d))
        x = self.after(self.head(x))
        return x.mean((2, 3)) if x.ndim == 4 else x


def _network(model: nn.Module) -> Network:
    preprocessing = load_classifier(timm_model(), labels=list("abcde")).preprocessing
    return Network(model.eval(), preprocessing)


@pytest.mark.parametrize("head", [
    nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)), nn.Linear(6, 5, bias=False), nn.Conv2d(6, 5, 1),
])  # fmt: skip
@pytest.mark.parametrize("pooled", [True, False])
def test_the_last_layer_of_any_head_is_read(head: nn.Module, pooled: bool) -> None:
    torch.manual_seed(0)
    if not (pooled or isinstance(head, nn.Conv2d)):
        pytest.skip("a Linear layer takes no feature maps")
    network = _network(_Deep(head, pooled=pooled, after=nn.Identity()))
    images = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    (found,) = head_inputs(network, images, torch.zeros(9, dtype=torch.int64))
    with torch.no_grad():
        torch.testing.assert_close(found.logits, network(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("after", [nn.Softmin(1), nn.Sequential(nn.Hardtanh(-1e-3, 1e-3), nn.Softmin(1))])
def test_a_head_that_is_bent_afterwards_is_refused(after: nn.Module) -> None:
    torch.manual_seed(0)
    network = _network(_Deep(nn.Conv2d(6, 5, 1), pooled=False, after=after))
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    with pytest.raises(NonlinearHeadError, match="not those of its head's linear layers"):
        head_inputs(network, images, torch.zeros(64, dtype=torch.int64))


def test_nothing_of_the_network_changes() -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    network = _network(model).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    head_inputs(network, torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_robust_z_by_hand() -> None:
    assert robust_z(torch.tensor([1.0, 2, 3, 4, 100])).tolist() == pytest.approx(
        [-2 / 1.4826, -1 / 1.4826, 0, 1 / 1.4826, 97 / 1.4826], rel=1e-5
    )
    found = robust_z(torch.tensor([1.0, 1, 1, 5]))
    assert found[0] == 0
    assert 1000 < found[3] < torch.inf
    assert robust_z(torch.tensor([1.0, 2, 3, torch.inf]))[3] == torch.inf
    assert robust_z(torch.full((3,), torch.inf)).isinf().all()
