"""The story: pull a model and clean images, measure, defend, measure again, report, save and publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from hfdetox.config import DEFAULT_DEFENSE
from hfdetox.defenses import DefenseConfig, choose_defense, describe_defense
from hfdetox.evaluation.evaluator import check_plausible, decoded, prepare_evaluator
from hfdetox.evaluation.results import EvalResult
from hfdetox.hub.upload import check_card
from hfdetox.models.classifier import load_classifier
from hfdetox.reporting.card import build_card, validate_card
from hfdetox.reporting.gallery import check_gallery, draw_gallery
from hfdetox.runs.folder import RunOptions, log_folder, trigger_specs
from hfdetox.runs.plan import plan
from hfdetox.runs.publish import check_push_allowed
from hfdetox.runs.result import DetoxResult, draw_strip
from hfdetox.runs.steps import (
    RunWarnings,
    close_report,
    gather_artifacts,
    open_report,
    open_run,
    pin,
    pull_images,
    save_result,
    selected_weights,
    train,
)
from hfdetox.training.devices import forget_peak_memory, make_accelerator, peak_memory
from hfdetox.triggers import Trigger, parse_triggers, reload_triggers

__all__ = ["DetoxResult", "detoxify", "evaluate", "plan"]


def detoxify(
    model: str | Path | nn.Module | None = None, *,
    dataset: Any = None, config: str | None = None, split: str | None = None, eval_split: str | None = None,
    image_column: str | None = None, label_column: str | None = None, samples: int | float = 0.05,
    eval_samples: int | None = None, label_map: str | Path | None = None, allow_missing_classes: bool = False,
    defense: str | DefenseConfig = DEFAULT_DEFENSE, settings: Mapping[str, str] | None = None,
    triggers: Sequence[str | Trigger] = (), target: str | int | None = None,
    precision: str = "auto", device: str = "auto", seed: int = 0, log_with: str | None = None,
    revision: str | None = None, dataset_revision: str | None = None, trust_remote_code: bool = False,
    processor: Any = None, preprocessing: Any = None, labels: Sequence[str] | int | None = None,
    output: str | Path | None = None, resume: str | Path | None = None, keep_run: bool = False,
    push_to: str | None = None, private: bool = False, create_pr: bool = False, overwrite: bool = False,
    progress: bool = True,
) -> DetoxResult:  # fmt: skip
    """Make an image classifier forget any backdoor, and measure what that did.

    Args:
        model: a Hub id, a timm id, a local folder, or a loaded module (then with `processor`, or `preprocessing` and
            `labels`; see `load_classifier`). None only with `resume`.
        dataset: clean images: a Hub id, a folder or a `datasets` object; None takes the one the model's card names.
        samples: clean images for the defense: a float is a share of the split (at most 5000 images), an int a count.
        eval_samples: measure on so many images, drawn uniformly; None measures on the whole evaluation split.
        label_map: a file of pairs (dataset label to model label) where the names do not match.
        defense: a configuration such as `D3Config(epsilon=0.1)`, or `NAME[:PRESET]` with `settings` as `--set` takes
            them; an object of a class that no package offers is recorded by its name and settings.
        triggers: known triggers to measure: specifications, trigger files or `Trigger` objects.
        target: label (name or index) that triggers without one aim at.
        precision: `auto`, `no`, `fp16` or `bf16`, of the training; measuring is always float32.
        output: folder of the result; with it the run can be resumed from `OUTPUT.run`. None keeps it in memory.
        log_with: a tracker; TensorBoard writes to `OUTPUT.logs`, or to `hfdetox-logs` without output.
        resume: the run folder of a stopped run, whose recorded options replace these (pass what was an object again:
            model, dataset, a defense or trigger of your own class); `push_to` and what belongs to it may be new.
        push_to: repository that the result is pushed to, see `DetoxResult.push_to_hub`.

    Returns:
        The cleaned model and its report, the same on every process.

    Raises:
        UsageError: it cannot be run as asked. HubError: the Hub or the network. RunError: it ran and failed.
    """
    spec, texts = describe_defense(defense) if isinstance(defense, DefenseConfig) else (defense, dict(settings or {}))
    options = RunOptions(
        model=str(model) if isinstance(model, str | Path) else None,
        dataset=str(dataset) if isinstance(dataset, str | Path) else None, config=config, split=split,
        eval_split=eval_split, image_column=image_column, label_column=label_column, samples=samples,
        eval_samples=eval_samples, label_map=_text(label_map), allow_missing_classes=allow_missing_classes,
        defense=spec, settings=texts, triggers=trigger_specs(triggers), target=_text(target), precision=precision,
        seed=seed, device=device, revision=revision, dataset_revision=dataset_revision,
        trust_remote_code=trust_remote_code, output=_text(output), push_to=push_to, private=private,
        create_pr=create_pr, overwrite=overwrite,
    )  # fmt: skip
    options, run = open_run(options, resume)
    push_to, push_options = options.push_to, options.publishing()
    method, preset = choose_defense(defense, options.defense, options.settings, resumed=resume is not None)
    # objects hold more than their text form, which is all that the options of a new run have of them
    known = parse_triggers(triggers) if resume is None else reload_triggers(options.triggers, triggers)
    accelerator = make_accelerator(options.device, options.precision, log_with, str(log_folder(options.output)))
    if push_to is not None:
        push_to = check_push_allowed(push_to, **push_options)
        options = replace(options, push_to=push_to)
    notes = RunWarnings(accelerator)

    with accelerator.main_process_first():
        source = model if isinstance(model, nn.Module) else options.model or ""
        classifier = load_classifier(source, revision=options.revision, processor=processor,
                                     preprocessing=preprocessing, labels=labels,
                                     trust_remote_code=options.trust_remote_code)  # fmt: skip
        images = pull_images(options, dataset, classifier, notes)
    evaluation = prepare_evaluator(classifier, images.evaluation, known, accelerator, target=options.target,
                                    warn=notes.warn, progress=progress)  # fmt: skip
    before = evaluation.measure("before")
    check_plausible(before, evaluation.clean.labels, classifier.labels, notes.warn)

    # a run must not fail at its end for a reason known at its start
    options = pin(options, classifier, images)
    report = open_report(options, classifier, images, method, preset, before, accelerator, push_to=push_to, notes=notes)
    artifacts = gather_artifacts(classifier, images, evaluation, whole_split=images.whole_split)
    draft = build_card(report, source_card=artifacts.source_card, repo_id=push_to, labels=classifier.labels)
    validate_card(draft)
    if accelerator.is_main_process:
        if push_to is not None:
            check_card(draft)
        if run is not None:
            run.begin(options, known)

    start = selected_weights(classifier, method)
    pixels = decoded(images.clean, classifier, accelerator, "decode", progress)
    forget_peak_memory(accelerator)
    record = train(classifier, method, pixels, accelerator, options, run=run, log_with=log_with, progress=progress)
    if any(entry.get("unchanged") == 1 for entry in record.history):
        notes.warn(f"{method.name} found nothing that it would change, and returns the model as it came")
    memory = peak_memory(accelerator)
    classifier.round_weights()
    after = evaluation.measure("after")

    artifacts.weight_changes = {name: now - start[name] for name, now in selected_weights(classifier, method).items()}
    artifacts.strip = draw_strip(evaluation, before, after)
    result = DetoxResult(close_report(report, method, record, before, after, memory), classifier, artifacts)
    if options.output is not None:
        save_result(result, options, run)
    if accelerator.is_main_process:
        if run is not None and not keep_run:
            run.remove()
        if push_to is not None:
            result.push_to_hub(push_to, **push_options)
    accelerator.wait_for_everyone()
    # the main process knows the hash of what it wrote, and the commit
    result.report = broadcast_object_list([result.report])[0]
    return result


def evaluate(
    model: str | Path | nn.Module, *,
    dataset: Any = None, config: str | None = None, split: str | None = None, eval_split: str | None = None,
    image_column: str | None = None, label_column: str | None = None, eval_samples: int | None = None,
    label_map: str | Path | None = None, allow_missing_classes: bool = False, triggers: Sequence[str | Trigger] = (),
    target: str | int | None = None, device: str = "auto", seed: int = 0, revision: str | None = None,
    dataset_revision: str | None = None, trust_remote_code: bool = False, processor: Any = None,
    preprocessing: Any = None, labels: Sequence[str] | int | None = None, gallery: str | Path | None = None,
    progress: bool = True,
) -> EvalResult:  # fmt: skip
    """Measure a classifier: accuracy, loss, what each known trigger does, and how visible it is.

    The arguments are those of `detoxify`, and so are the images that are measured: those left when the defense's are
    set aside. A module that is passed is turned to float32 and eval mode. Nothing is written but `gallery`, a PNG file
    that shows each trigger on a few images. Raises what `detoxify` raises.
    """
    known = parse_triggers(triggers)
    if gallery is not None:
        check_gallery(Path(gallery), known)
    options = RunOptions(
        model=None, dataset=str(dataset) if isinstance(dataset, str | Path) else None, config=config, split=split,
        eval_split=eval_split, image_column=image_column, label_column=label_column, eval_samples=eval_samples,
        label_map=_text(label_map), allow_missing_classes=allow_missing_classes, settings={},
        triggers=trigger_specs(triggers), target=_text(target), seed=seed, dataset_revision=dataset_revision,
    )  # fmt: skip
    accelerator = make_accelerator(device, "no")
    notes = RunWarnings(accelerator)
    with accelerator.main_process_first():
        classifier = load_classifier(model, revision=revision, processor=processor, preprocessing=preprocessing,
                                     labels=labels, trust_remote_code=trust_remote_code)  # fmt: skip
        images = pull_images(options, dataset, classifier, notes)
    evaluation = prepare_evaluator(classifier, images.evaluation, known, accelerator, target=options.target,
                                    warn=notes.warn, progress=progress)  # fmt: skip
    outcome = evaluation.measure("measure")
    check_plausible(outcome, evaluation.clean.labels, classifier.labels, notes.warn)
    measured = outcome.measurement
    visibility = evaluation.visibility()
    if gallery is not None and accelerator.is_main_process:
        draw_gallery(evaluation, outcome, visibility, Path(gallery))
    return EvalResult(measured.accuracy, measured.loss, measured.triggers, measured.classes, visibility)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
