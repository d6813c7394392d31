"""Heads, patterns and pre-head norms over the families of both libraries."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
import transformers as tf
from torch import nn
from transformers import AutoModelForImageClassification

from hfdetox.models.classifier import load_classifier
from hfdetox.models.layers import LayerPatternError, head_layers, match_layers, norms_before_head
from hfdetox.models.network import Network
from hfdetox.models.preprocessing import CallablePreprocessing
from tests.tiny_models import timm_folder, timm_model, transformers_model

# neither usual sizes, nor widths of anything else
_TOWER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
          "image_size": 40, "patch_size": 8}  # fmt: skip
SIGLIP_NORM = "vision_model.post_layernorm"


def towered(kind, classes):
    """Return an image classifier of a family that has its image part in `vision_config`."""
    config = getattr(tf, f"{kind}Config")(vision_config=_TOWER, num_labels=classes)
    return getattr(tf, f"{kind}ForImageClassification")(config)


class TwoNorms(nn.Module):
    """What MobileNetV5's head is: two RMSNorms in a row."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second, self.head = (
            nn.Conv2d(3, 8, 8),
            nn.RMSNorm(8),
            nn.RMSNorm(8),
            nn.Linear(8, 5),
        )

    def forward(self, images):
        return self.head(self.second(self.first(self.stem(images).mean((2, 3)))))


# model, head layers, norms that feed the head directly
CASES = {
    "timm resnet": (lambda: timm_model("test_resnet"), ["fc"], []),
    "timm vit": (lambda: timm_model("test_vit"), ["head"], ["norm"]),
    "timm vit, pooled": (lambda: timm_model("test_vit", global_pool="avg"), ["head"], ["fc_norm"]),
    "timm convnext": (lambda: timm_model("test_convnext"), ["head.fc"], ["head.norm"]),
    "timm efficientnet": (lambda: timm_model("test_efficientnet"), ["classifier"], []),
    "timm swin": (
        lambda: timm_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(1, 1), num_heads=(2, 2)),
        ["head.fc"], ["norm"],
    ),
    "timm deit, distilled": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1),
        ["head", "head_dist"], ["norm"],
    ),
    "timm volo, auxiliary head": (lambda: timm_model("volo_d1_224", img_size=32), ["aux_head", "head"], ["norm"]),
    "timm resmlp, affine": (lambda: timm_model("resmlp_12_224", img_size=32), ["head"], ["norm"]),
    "timm hgnet, affine block": (lambda: timm_model("hgnetv2_b0"), ["head.fc"], ["head.last_conv.2"]),
    "timm coat, a layer between": (lambda: timm_model("coat_mini"), ["head"], ["norm2", "norm3", "norm4"]),
    "two norms in a row": (TwoNorms, ["head"], ["first", "second"]),
    "timm inception, auxiliary logits": (lambda: timm_model("inception_v3", aux_logits=True), ["fc"], []),
    "transformers siglip, unused pooling": (lambda: towered("Siglip", 5), ["classifier"], [SIGLIP_NORM]),
    "transformers vit": (lambda: transformers_model("vit"), ["classifier"], ["vit.layernorm"]),
    "transformers deit": (lambda: transformers_model("deit"), ["classifier"], ["deit.layernorm"]),
    "transformers deit, distilled": (
        lambda: transformers_model("deit-teacher"), ["cls_classifier", "distillation_classifier"], ["deit.layernorm"],
    ),
    "transformers swin": (lambda: transformers_model("swin"), ["classifier"], ["swin.layernorm"]),
    "transformers convnext": (lambda: transformers_model("convnext"), ["classifier"], ["convnext.layernorm"]),
    "transformers resnet": (lambda: transformers_model("resnet"), ["classifier.1"], []),
    "transformers beit": (lambda: transformers_model("beit"), ["classifier"], ["beit.pooler.layernorm"]),
    "transformers mobilevit": (lambda: transformers_model("mobilevit"), ["classifier"], []),
    "transformers levit, distilled": (
        lambda: transformers_model("levit-teacher"), ["classifier.linear", "classifier_distill.linear"],
        ["classifier.batch_norm", "classifier_distill.batch_norm"],
    ),
    "torchvision squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=5), ["classifier.1"], []),
    "torchvision resnet": (lambda: torchvision.models.resnet18(num_classes=5), ["fc"], []),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(40, 8, 1, 2, 16, 16, num_classes=5),
        ["heads.head"], ["encoder.ln"],
    ),
}  # fmt: skip


def build(case):
    torch.manual_seed(0)
    model = CASES[case][0]()
    with torch.no_grad():
        for parameter in model.parameters():  # torchvision's vit starts with a head of zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("case", CASES)
def test_head_and_norms_of_each_family(case):
    model = build(case).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    assert head_layers(model) == CASES[case][1]
    assert norms_before_head(model) == CASES[case][2]
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_named_norm_does_make_the_sign_flip_free():
    model = transformers_model("swin")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(pixels).logits
        for tensor in (model.classifier.weight, model.swin.layernorm.weight, model.swin.layernorm.bias):
            tensor.mul_(-1)
        torch.testing.assert_close(model(pixels).logits, before)


def test_a_norm_with_a_layer_between_is_not_named():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.hidden, self.act, self.out = nn.LayerNorm(12), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)

        def forward(self, images):
            return self.out(self.act(self.hidden(self.norm(images.flatten(1)))))

    model = Deep()
    assert head_layers(model) == ["out"]
    assert norms_before_head(model, (3, 2, 2)) == []
    assert norms_before_head(model) == []


def test_timm_wrapper_answers_through_its_timm_model(tmp_path):
    load_classifier(timm_folder(tmp_path / "source", "test_vit")).save(tmp_path / "saved")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert head_layers(model) == ["timm_model.head"]
    assert norms_before_head(model) == ["timm_model.norm"]


def test_network_names_start_at_the_network(tmp_path):
    network = load_classifier(timm_folder(tmp_path / "source", "test_convnext")).network
    assert head_layers(network) == match_layers(network, ["head"]) == ["model.head.fc"]
    assert norms_before_head(network) == ["model.head.norm"]
    assert isinstance(network.get_submodule("model.head.fc"), nn.Linear)


def test_hidden_layers_of_as_many_outputs_as_labels_are_no_heads():
    model = transformers_model("vit")
    assert model.config.hidden_size == 16
    model.config.num_labels = 16
    model.classifier = nn.Linear(16, 16)
    assert head_layers(model) == ["classifier"]


class Shuffled(nn.Module):
    """A stranger's network: its head comes first, an auxiliary head that is not used last."""

    def __init__(self, classes, conv=False):
        super().__init__()
        self.conv = conv
        self.head = nn.Conv2d(12, classes, 1) if conv else nn.Linear(12, classes)
        self.body = nn.Sequential(nn.Conv2d(3, 12, 4), nn.ReLU(), nn.Conv2d(12, 12, 1), nn.ReLU())
        self.auxiliary = nn.Linear(12, classes)

    def forward(self, images):
        features = self.body(images)
        return self.head(features).relu().mean((2, 3)) if self.conv else self.head(features.mean((2, 3)))


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("classes", [5, 12])
def test_the_head_of_a_strangers_network_is_what_makes_its_logits(classes, conv):
    torch.manual_seed(0)
    model = Shuffled(classes, conv)
    assert head_layers(model) == ["head"]
    network = Network(model, CallablePreprocessing(lambda image: torch.zeros(3, 40, 40)))
    assert head_layers(network) == match_layers(network, ["head"]) == ["model.head"]


@pytest.mark.parametrize("classes", [24, 40])
@pytest.mark.parametrize("kind", ["Siglip", "CLIP", "MetaClip2"])
def test_as_many_classes_as_a_hidden_width_has(kind, classes):
    assert head_layers(towered(kind, classes)) == ["classifier"]


@pytest.mark.parametrize("classes", [8, 16, 24, 32])
def test_as_many_classes_as_a_stage_has_channels(classes):
    config = tf.HGNetV2Config(
        embedding_size=8, depths=[1] * 4, hidden_sizes=[8, 16, 16, 32], stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 24], stage_mid_channels=[8] * 4, stage_out_channels=[16, 16, 24, 32],
        stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4, num_labels=classes,
    )  # fmt: skip
    assert head_layers(tf.HGNetV2ForImageClassification(config)) == ["fc"]


def test_a_size_in_words_is_a_size():
    config = tf.PvtV2Config(
        image_size={"height": 32, "width": 64}, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2], num_labels=5,
    )  # fmt: skip
    assert head_layers(model := tf.PvtV2ForImageClassification(config)) == ["classifier"]
    assert norms_before_head(model) == ["pvt_v2.encoder.layers.3.layer_norm"]


class Narrow(TwoNorms):
    """Takes one size, which is none of the usual ones."""

    def forward(self, images):
        if images.shape[1:] != (3, 40, 72):
            raise ValueError("another size")
        return super().forward(images)


def test_a_size_that_nobody_guesses_is_asked_for(caplog):
    model = Narrow()
    assert norms_before_head(model) == []
    assert "Narrow takes no usual size of images" in caplog.text
    model.image_size = (40, 72)
    assert norms_before_head(model) == ["first", "second"]
    del model.image_size
    prepared = CallablePreprocessing(lambda image: torch.zeros(3, 40, 72))
    assert norms_before_head(Network(model, prepared)) == ["model.first", "model.second"]


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm,
                                    nn.utils.weight_norm, nn.utils.spectral_norm])  # fmt: skip
def test_a_head_whose_weight_is_computed_is_refused_in_one_line(normed):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), normed(nn.Linear(8, 3)))
    for find in (head_layers, norms_before_head, lambda model: match_layers(model, ["3"])):
        with pytest.raises(LayerPatternError, match=r"^3 is weight- or spectral-normed .*remove_parametrizations$"):
            find(model)
    assert match_layers(model, ["1"]) == ["1"]


def test_patterns_select_by_name_or_by_the_module_around():
    model = timm_model("test_resnet")
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert match_layers(model, ["head"]) == ["fc"]
    assert match_layers(model, ["*"]) == names
    inside = [name for name in names if name.startswith("layer4.")]
    assert len(inside) > 1
    assert match_layers(model, ["layer4"]) == match_layers(model, ["layer4.*"]) == inside
    assert match_layers(model, ["fc", "layer?.0.conv1", "head"]) == [f"layer{i}.0.conv1" for i in (1, 2, 3, 4)] + ["fc"]
    assert match_layers(timm_model("test_vit"), ["blocks.*.mlp", "head"])[-2:] == ["blocks.5.mlp.fc2", "head"]


def test_a_pattern_that_matches_nothing_lists_what_can_be_selected():
    with pytest.raises(LayerPatternError, match=r"'clasifier'; use head or .*blocks\.\*\.mlp\.fc1 \(6\).*, head$"):
        match_layers(timm_model("test_vit"), ["head", "clasifier"])
    with pytest.raises(LayerPatternError, match="no layer pattern given"):
        match_layers(timm_model("test_vit"), [])


def test_a_norm_alone_cannot_be_selected():
    with pytest.raises(LayerPatternError, match="no Linear or Conv2d layer matches 'norm'"):
        match_layers(timm_model("test_vit"), ["norm"])


def test_model_without_a_classifier():
    with pytest.raises(LayerPatternError, match="has no classifier layer"):
        head_layers(timm.create_model("test_vit", num_classes=0))
    with pytest.raises(LayerPatternError, match="has no classifier layer"):
        head_layers(nn.Sequential(nn.Flatten()))
