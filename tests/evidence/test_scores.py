"""The scores on networks made by hand: what each finds, what each misses, and what they say then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfdetox.errors import UsageError
from hfdetox.evidence.base import SCORES, outlier
from hfdetox.evidence.head_probe import HeadProbe
from hfdetox.evidence.latent_shift import LatentShift
from hfdetox.evidence.margin import Margin, p_value
from hfdetox.evidence.odd_images import OddImages, odd_images
from hfdetox.evidence.results import Finding, ScoreResult
from hfdetox.evidence.run import chosen_scores, most_accused, scan_suspect, still
from hfdetox.evidence.scar import Scar
from hfdetox.evidence.thresholds import judge_score
from tests.evidence.suspects import (
    CLASSES,
    LABELS,
    Classifier,
    Echo,
    EveryClass,
    Faint,
    pictures,
    put_echo,
    put_faint,
    put_patch,
    suspect_of,
)

TARGET = 2


def test_every_score_says_what_it_is() -> None:
    for name, kind in SCORES.items():
        assert name == kind.name
        assert kind.summary
        assert kind.paper
        assert kind.cost
        assert "statistic" in (kind.__doc__ or "") or name in ("scar", "odd-images")


def test_the_latent_shift_names_the_target_of_an_open_backdoor() -> None:
    clean = LatentShift().measure(suspect_of(Classifier()))
    found = LatentShift().measure(suspect_of(Classifier(TARGET)))
    assert found.accused == TARGET
    assert found.statistic is not None
    assert clean.statistic is not None
    assert found.statistic > 10 * clean.statistic
    assert found.values is not None
    assert found.values[TARGET] == min(v for v in found.values if v is not None)
    assert found.passes == 240


def test_the_scar_names_the_class_that_is_pushed_away() -> None:
    model = Classifier()
    with torch.no_grad():
        model.head.bias[TARGET] -= 60
    found = judge_score("scar", Scar().measure(suspect_of(model)), "after")
    assert found.accused == TARGET
    assert found.finding == Finding.SUSPICIOUS


def test_the_head_probe_names_the_class_that_the_head_prefers_with_and_without_images() -> None:
    model = Classifier(TARGET)
    for suspect in (suspect_of(model), suspect_of(model, torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0))):
        found = HeadProbe().measure(suspect)
        assert found.accused == TARGET
        assert judge_score("head-probe", found, "before").finding == Finding.SUSPICIOUS


class Leaning(nn.Module):
    """So many features, and random weights, of which the target's are a little larger than zero on average."""

    def __init__(self, width: int, lean: float) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(CLASSES, width, generator=draw)
        self.fc = nn.Linear(width, CLASSES)
        with torch.no_grad():
            self.fc.weight.copy_(weight - weight.mean(1, keepdim=True))
            self.fc.weight[TARGET] += lean
            self.fc.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1).repeat(1, 20)[:, : self.fc.in_features])

    def get_classifier(self) -> nn.Module:
        return self.fc


@pytest.mark.parametrize("width", [1280, 2048])
def test_weights_that_lean_a_little_do_not_accuse_a_class_of_a_wide_head_as_they_would_of_a_narrow_one(
    width: int,
) -> None:
    # of tuned ImageNet networks without a backdoor a row's mean is up to a tenth of its standard deviation
    bare = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    for lean, finding in ((0.07, Finding.NO_EVIDENCE), (0.3, Finding.SUSPICIOUS)):
        found = HeadProbe().measure(suspect_of(Leaning(width, lean), bare, torch.zeros(0)))
        assert found.accused == TARGET
        assert judge_score("head-probe", found, "before").finding == finding


def test_the_margin_names_the_class_with_the_largest_margin() -> None:
    model = Classifier()
    with torch.no_grad():
        model.head.weight[TARGET] *= 10
    suspect = suspect_of(model)
    with still(suspect.network):
        found = Margin().measure(suspect)
    assert found.accused == TARGET
    assert 0 < found.passes <= 2 * 30 * 300 * CLASSES
    assert found.note.startswith("p = ")


def test_the_p_value_is_that_of_the_gamma_distribution() -> None:
    margins = torch.tensor([1.0, 1.1, 0.9, 1.2, 0.8, 1.05, 0.95, 1.15, 0.85, 9.0])
    assert p_value(margins) < 1e-3
    assert p_value(torch.cat([margins[:-1], torch.tensor([1.2])])) > 0.05


def test_odd_images_rise_by_a_plain_loop() -> None:
    suspect = suspect_of(Classifier())
    with still(suspect.network):
        found = OddImages().measure(suspect)
    assert found.values is None
    assert found.accused is None
    assert found.statistic is not None
    assert 0 < found.statistic < 1
    assert found.passes == 22 * 192
    # less limit, fewer images; too little, none
    suspect.limit = 22 * 10
    with still(suspect.network):
        assert OddImages().measure(suspect).passes == 220
    suspect.limit = 20
    with pytest.raises(UsageError, match="too short"):
        OddImages().measure(suspect)


def test_odd_images_have_the_pixels_of_two_clean_ones() -> None:
    images = pictures(8)[0].float()
    odd = odd_images(images, torch.Generator().manual_seed(0))
    assert odd.shape == images.shape
    for row in range(len(odd)):
        known = torch.cat([images[row].flatten(), images[row - 1].flatten()])
        assert torch.isin(odd[row], known).all()
        assert not torch.equal(odd[row], images[row])


@pytest.mark.parametrize("thorough", [False, True])
def test_a_lock_that_no_slope_leads_to_is_missed_by_every_score_and_nothing_calls_it_clean(thorough: bool) -> None:
    """The must-show: the trigger works on every image, and no score sees it."""
    model = Classifier(TARGET, lock=True, hidden=True)
    suspect = suspect_of(model)
    images, labels = pictures(120, seed=9)
    others = labels != TARGET
    with torch.no_grad():
        assert (suspect.network(images).argmax(1) == labels).float().mean() > 0.95
        assert (suspect.network(put_patch(images))[others].argmax(1) == TARGET).all()
    scan, _ = scan_suspect(suspect, LABELS, "before", thorough=thorough)
    for name, one in scan.scores.items():
        assert one.accused != TARGET or one.finding != Finding.SUSPICIOUS, name
    assert scan.finding in (Finding.NO_EVIDENCE, Finding.UNKNOWN)
    assert "clean" not in (word.value for word in Finding)


# of each score a model in its blind spot, which its docstring names, and when it is looked at
MISSED = {
    "latent-shift": (EveryClass(), put_patch, "before"),
    "head-probe": (Classifier(TARGET, hidden=True), put_patch, "before"),
    "odd-images": (Classifier(TARGET, lock=True, hidden=True), put_patch, "before"),
    "margin": (Echo(TARGET, hidden=True), put_echo, "before"),
    "patch": (Faint(TARGET, hidden=True), put_faint, "before"),
    "blend": (Classifier(TARGET, hidden=True), put_patch, "before"),
    "scar": (Classifier(TARGET, hidden=True), put_patch, "after"),
}


@pytest.mark.parametrize("name", SCORES)
def test_each_score_has_a_model_that_it_misses_and_the_run_does_not_call_it_clean(name: str) -> None:
    model, put, when = MISSED[name]
    suspect = suspect_of(model)
    images, labels = pictures(120, seed=9)
    wanted = (labels + 1) % CLASSES if isinstance(model, EveryClass) else torch.full_like(labels, TARGET)
    with torch.no_grad():
        assert (suspect.network(images).argmax(1) == labels).float().mean() > 0.95
        assert (suspect.network(put(images)).argmax(1) == wanted)[labels != TARGET].float().mean() > 0.95
    scan, _ = scan_suspect(suspect, LABELS, when, thorough=True)  # type: ignore[arg-type]
    missed = scan.scores[name]
    assert missed.statistic is not None
    assert missed.finding == Finding.NO_EVIDENCE
    assert scan.finding in (Finding.NO_EVIDENCE, Finding.UNKNOWN)


def test_a_scan_names_an_open_backdoor_and_reconstructs_its_trigger() -> None:
    scan, triggers = scan_suspect(suspect_of(Classifier(TARGET)), LABELS, "before")
    assert scan.finding == Finding.SUSPICIOUS, scan.why
    assert (scan.accused, scan.label) == (TARGET, "cat")
    assert scan.accuracy is not None
    assert scan.accuracy.value > 0.95
    assert any(trigger.target == TARGET for trigger in triggers)
    assert scan.passes == sum(one.passes for one in scan.scores.values())


def test_a_limit_bounds_the_passes_of_all_scores_together() -> None:
    for limit in (500, 3000, 30_000):
        scan, _ = scan_suspect(suspect_of(Classifier(TARGET), limit=limit), LABELS, "before")
        # the one pass over the images is always taken
        assert scan.passes <= max(limit, 240)


def test_two_classes_are_too_few_to_stand_out() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    images, labels = pictures()
    scan, _ = scan_suspect(suspect_of(model, images, labels % 2), LABELS[:2], "before", thorough=True)
    assert scan.finding == Finding.UNKNOWN
    assert scan.why == "2 classes are too few to tell one that stands out"
    assert scan.scores["latent-shift"].note == "2 classes are too few to tell one that stands out"


def test_many_classes_with_one_image_each_are_unknown() -> None:
    torch.manual_seed(0)
    count = 200
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, count))
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    labels = [str(index) for index in range(count)]
    suspect = suspect_of(model, images, torch.arange(count), limit=3000)
    scan, _ = scan_suspect(suspect, labels, "before", thorough=True)
    assert scan.finding == Finding.UNKNOWN
    assert "the model is right on only" in scan.why
    assert "left out: 200 classes" in scan.scores["margin"].note


def test_without_images_the_scores_that_need_none_run_and_the_rest_say_so() -> None:
    suspect = suspect_of(Classifier(TARGET))
    suspect.images = suspect.labels = None
    scan, triggers = scan_suspect(suspect, LABELS, "before", thorough=True)
    assert scan.samples == 0
    assert not triggers
    for name, one in scan.scores.items():
        assert (one.statistic is None) == SCORES[name].needs_images
        assert one.note == "needs clean images" or not SCORES[name].needs_images
    assert scan.accuracy is None


def test_a_head_that_is_no_linear_layer_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES), nn.Softmin(1))
    scan, _ = scan_suspect(suspect_of(model), LABELS, "before")
    assert scan.finding == Finding.UNKNOWN
    assert "something that is not linear follows them" in scan.scores["latent-shift"].note
    assert scan.scores["odd-images"].statistic is not None


def test_an_outlier_is_counted_from_the_side_that_is_asked() -> None:
    values = torch.tensor([10.0, 11, 9, 10.5, 9.5, 2.0])
    low, high = outlier(values, low=True), outlier(values, low=False)
    assert (low.accused, high.accused) == (5, 1)
    assert low.statistic is not None
    assert low.statistic > 5
    # a class that nothing leads to is none that stands out
    found = outlier(torch.tensor([1.0, 2, 3, 2, torch.inf]), low=False)
    assert found.accused == 2
    assert found.values == [1, 2, 3, 2, None]


def test_the_classes_looked_at_are_those_accused_and_then_those_next_to_them() -> None:
    suspect = suspect_of(Classifier(TARGET))
    results = {"latent-shift": LatentShift().measure(suspect)}
    chosen = most_accused(results, "before")
    assert chosen is not None
    assert chosen[0] == TARGET
    assert len(chosen) == 2
    assert most_accused({}, "before") is None
    # one alone is compared with another
    assert most_accused({"blend": ScoreResult([None] * 6, 1.0, 0)}, "before") == [0, 1]


def test_after_cleaning_other_scores_run() -> None:
    before, after = chosen_scores("before"), chosen_scores("after")
    assert "head-probe" in before
    assert "scar" not in before
    assert "scar" in after
    assert "head-probe" not in after
    assert "margin" not in before
    assert "margin" in chosen_scores("before", thorough=True)
    assert list(chosen_scores("before", thorough=True))[-1] != "margin" or len(before) < 4


def test_nothing_of_the_network_changes() -> None:
    suspect = suspect_of(Classifier(TARGET))
    suspect.network.train()
    before = {name: tensor.clone() for name, tensor in suspect.network.state_dict().items()}
    state = torch.random.get_rng_state()
    scan_suspect(suspect, LABELS, "before", thorough=True)
    assert suspect.network.training
    assert all(parameter.requires_grad for parameter in suspect.network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in suspect.network.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
