"""The story: pull a model and clean images, measure, defend, measure again, report, save and publish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

import hfdetox
from hfdetox.card import build_card, validate_card
from hfdetox.data import Images, default_dataset, load_images
from hfdetox.defenses import DefenseConfig, describe_defense, parse_defense
from hfdetox.devices import describe_devices, make_accelerator, resolve_device, resolve_precision
from hfdetox.engine import Engine, TrainingRecord
from hfdetox.environment import describe_environment
from hfdetox.errors import UsageError
from hfdetox.evaluation import Evaluation, check_plausible, decoded, prepare_evaluation
from hfdetox.hub import read_text_file, resolve
from hfdetox.metrics import Outcome, ratings
from hfdetox.models import Classifier, load_classifier
from hfdetox.publish import check_card, check_push_allowed
from hfdetox.report import DefenseInfo, Measurement, OutputInfo, Report
from hfdetox.result import CHECKED_IMAGES, DetoxResult, Exhibits, draw_strip
from hfdetox.runs import RunFolder, RunOptions, check_output, trigger_specs
from hfdetox.triggers import Trigger, parse_triggers

logger = logging.getLogger("hfdetox")

__all__ = ["DetoxResult", "detoxify", "evaluate", "plan"]


def detoxify(
    model: str | Path | nn.Module | None = None, *,
    dataset: Any = None, config: str | None = None, split: str | None = None, eval_split: str | None = None,
    image_column: str | None = None, label_column: str | None = None, samples: int | float = 0.05,
    eval_samples: int | None = None, label_map: str | Path | None = None, allow_missing_classes: bool = False,
    defense: str | DefenseConfig = "d3:paper", settings: Mapping[str, str] | None = None,
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
        dataset: clean images: a Hub id, a local folder or a `datasets` object; None takes the one the model's card names.
        samples: clean images for the defence: a float is a share of the split (at most 5000 images), an int a count.
        eval_samples: measure on so many images, drawn uniformly; None measures on the whole evaluation split.
        label_map: a file of pairs (dataset label to model label) where the names do not match.
        defense: a configuration such as `D3Config(epsilon=0.1)`, or `NAME[:PRESET]` with `settings` as `--set` takes them.
        triggers: known triggers to measure: specifications, trigger files or `Trigger` objects.
        target: label (name or index) that triggers without one aim at.
        precision: `auto`, `no`, `fp16` or `bf16`, of the training; measuring is always float32.
        output: folder of the result; with it the run can be resumed from `OUTPUT.run`. None keeps everything in memory.
        resume: the run folder of a stopped run, whose recorded options replace these (objects must be passed again).
        push_to: repository that the result is pushed to, see `DetoxResult.push_to_hub`.

    Returns:
        The cleaned model and its report, the same on every process.

    Raises:
        UsageError: it cannot be run as asked. HubError: the Hub or the network. RunError: it ran and failed.
    """
    spec, texts = describe_defense(defense) if isinstance(defense, DefenseConfig) else (defense, dict(settings or {}))
    options = RunOptions(
        model=None if isinstance(model, nn.Module) or model is None else str(model),
        dataset=str(dataset) if isinstance(dataset, str | Path) else None, config=config, split=split, eval_split=eval_split,
        image_column=image_column, label_column=label_column, samples=samples, eval_samples=eval_samples,
        label_map=_text(label_map), allow_missing_classes=allow_missing_classes, defense=spec, settings=texts,
        triggers=trigger_specs(triggers), target=_text(target), precision=precision, seed=seed, device=device, revision=revision,
        dataset_revision=dataset_revision, trust_remote_code=trust_remote_code, output=_text(output),
    )  # fmt: skip
    options, run = _open_run(options, resume, overwrite)
    method, preset = parse_defense(options.defense, options.settings)
    known = list(triggers) if any(isinstance(t, Trigger) for t in triggers) else options.triggers
    accelerator = make_accelerator(options.device, options.precision, log_with, str(run.path) if run else None)
    if push_to is not None:
        check_push_allowed(push_to, private=private, create_pr=create_pr, overwrite=overwrite)
    notes = Notes(accelerator)

    with accelerator.main_process_first():
        classifier = load_classifier(
            model if isinstance(model, nn.Module) else options.model or "", revision=options.revision, processor=processor,
            preprocessing=preprocessing, labels=labels, trust_remote_code=options.trust_remote_code)  # fmt: skip
        images = _pull_images(options, dataset, classifier, notes)
    evaluation = prepare_evaluation(classifier, images.evaluation, parse_triggers(known), accelerator, target=options.target,
                                    warn=notes.warn, progress=progress)  # fmt: skip
    before = evaluation.measure("before")
    check_plausible(before, evaluation.clean.labels, classifier.labels, notes.warn)
    pinned = replace(options, revision=classifier.info.revision, dataset=options.dataset or _hub_name(images),
                     dataset_revision=images.info.revision)  # fmt: skip
    report = _open_report(pinned, classifier, images, method, preset, before, accelerator, push_to, notes)
    exhibits = _exhibits(classifier, images, evaluation, options)
    draft = build_card(report, source_card=exhibits.source_card, repo_id=push_to, labels=classifier.labels)
    validate_card(draft)
    if push_to is not None and accelerator.is_main_process:
        check_card(draft)
    if run is not None and accelerator.is_main_process:
        run.begin(pinned)

    start = _selected_weights(classifier, method)
    pixels = decoded(images.clean, classifier, accelerator, "decode", progress)
    record = _train(classifier, method, pixels, accelerator, options, run, log_with, progress)
    classifier.round_weights()
    after = evaluation.measure("after")

    report = _close_report(report, record, before, after, options.seed)
    exhibits.weight_changes = {name: now - start[name] for name, now in _selected_weights(classifier, method).items()}
    exhibits.strip = draw_strip(evaluation, before, after)
    result = DetoxResult(report, classifier, exhibits)
    if accelerator.is_main_process:
        if options.output is not None:
            result.save(options.output, overwrite=overwrite)
        if run is not None and not keep_run:
            run.remove()
        if push_to is not None:
            result.push_to_hub(push_to, private=private, create_pr=create_pr, overwrite=overwrite)
    accelerator.wait_for_everyone()
    return result


def evaluate(
    model: str | Path | nn.Module, *,
    dataset: Any = None, config: str | None = None, split: str | None = None, eval_split: str | None = None,
    image_column: str | None = None, label_column: str | None = None, eval_samples: int | None = None,
    label_map: str | Path | None = None, allow_missing_classes: bool = False, triggers: Sequence[str | Trigger] = (),
    target: str | int | None = None, device: str = "auto", seed: int = 0, revision: str | None = None,
    dataset_revision: str | None = None, trust_remote_code: bool = False, processor: Any = None, preprocessing: Any = None,
    labels: Sequence[str] | int | None = None, progress: bool = True,
) -> Measurement:  # fmt: skip
    """Measure a classifier as it is: accuracy, loss, and what each known trigger does. Nothing is changed or written.

    The arguments are those of `detoxify`, and so are the images that are measured. Raises what `detoxify` raises.
    """
    options = RunOptions(
        model=None, dataset=str(dataset) if isinstance(dataset, str | Path) else None, config=config, split=split,
        eval_split=eval_split, image_column=image_column, label_column=label_column, eval_samples=eval_samples,
        label_map=_text(label_map), allow_missing_classes=allow_missing_classes, settings={}, triggers=trigger_specs(triggers),
        target=_text(target), seed=seed, device=device, revision=revision, dataset_revision=dataset_revision,
    )  # fmt: skip
    accelerator = make_accelerator(device, "no")
    notes = Notes(accelerator)
    with accelerator.main_process_first():
        classifier = load_classifier(model, revision=revision, processor=processor, preprocessing=preprocessing, labels=labels,
                                     trust_remote_code=trust_remote_code)  # fmt: skip
        images = _pull_images(options, dataset, classifier, notes)
    evaluation = prepare_evaluation(classifier, images.evaluation, parse_triggers(triggers), accelerator,
                                    target=options.target, warn=notes.warn, progress=progress)  # fmt: skip
    return evaluation.measure("measure").measurement


def plan(model: str, *, dataset: str | None = None, defense: str = "d3:paper", settings: Mapping[str, str] | None = None,
         triggers: Sequence[str] = (), samples: int | float = 0.05, eval_samples: int | None = None, revision: str | None = None,
         dataset_revision: str | None = None, output: str | Path | None = None, push_to: str | None = None, private: bool = False,
         create_pr: bool = False, overwrite: bool = False, device: str = "auto", precision: str = "auto") -> dict[str, Any]:  # fmt: skip
    """Return what `detoxify` with these arguments would pull, choose, write and push; downloads a card at most.

    Raises what can be known at this point: unknown repositories, wrong settings or triggers, an output that exists.
    """
    method, preset = parse_defense(defense, dict(settings or {}))
    parse_triggers(triggers)
    kind = resolve_device(device)
    planned: dict[str, Any] = {"model": {"id": model, "revision": None, "files": []}}
    card = None
    if Path(model).is_dir():
        readme = Path(model) / "README.md"
        card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None
    else:
        state = resolve(model.removeprefix("hf_hub:").removeprefix("hf-hub:").partition("@")[0], revision=revision)
        weights = [name for name in state.files if name.endswith(".safetensors")]
        planned["model"] = {"id": state.id, "revision": state.sha, "files": weights}
        card = read_text_file(state.id, "README.md", state.sha)
    chosen = dataset or default_dataset(card)
    source = None if Path(chosen).exists() else resolve(chosen, repo_type="dataset", revision=dataset_revision)
    planned["dataset"] = {"id": chosen, "revision": source.sha if source else None, "samples": samples,
                          "eval_samples": eval_samples}  # fmt: skip
    planned["defense"] = {"name": method.name, "preset": preset, **method.settings()}
    planned["triggers"] = list(triggers)
    planned["device"], planned["precision"] = kind, resolve_precision(precision, kind)
    if output is not None:
        check_output(Path(output), overwrite=overwrite)
        planned["output"] = str(output)
    if push_to is not None:
        check_push_allowed(push_to, private=private, create_pr=create_pr, overwrite=overwrite)
        planned["push_to"] = push_to
    return planned


class Notes:
    """What the run has to say besides its numbers: shown at once on the main process, and kept for report and card."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.texts: list[str] = []
        self._shown = accelerator.is_main_process

    def warn(self, text: str) -> None:
        """Keep a warning, once."""
        if text not in self.texts:
            self.texts.append(text)
            if self._shown:
                logger.warning(text)


def _open_run(options: RunOptions, resume: str | Path | None, overwrite: bool) -> tuple[RunOptions, RunFolder | None]:
    if resume is not None:
        run = RunFolder(Path(resume))
        options = run.recorded()
        if options.output is not None:
            check_output(Path(options.output), overwrite=overwrite)
        return options, run
    if options.output is None:
        return options, None
    check_output(Path(options.output), overwrite=overwrite)
    run = RunFolder.beside(options.output)
    run.refuse_existing()
    return options, run


def _pull_images(options: RunOptions, dataset: Any, classifier: Classifier, notes: Notes) -> Images:
    for text in classifier.warnings:
        notes.warn(text)
    chosen = options.dataset if dataset is None or isinstance(dataset, str | Path) else dataset
    if chosen is None:
        chosen = default_dataset(classifier.card_source())
        notes.warn(f"the clean images are from {chosen}, which the model's own card names: its author chose them")
    return load_images(
        chosen, labels=classifier.labels, samples=options.samples, eval_samples=options.eval_samples, config=options.config,
        split=options.split, eval_split=options.eval_split, image_column=options.image_column,
        label_column=options.label_column, revision=options.dataset_revision,
        label_map=Path(options.label_map) if options.label_map else None, seed=options.seed,
        channels=classifier.preprocessing.input_size[0], allow_missing_classes=options.allow_missing_classes,
        warn=notes.warn,
    )  # fmt: skip


def _train(classifier: Classifier, method: DefenseConfig, pixels: Any, accelerator: Accelerator, options: RunOptions,
           run: RunFolder | None, log_with: str | None, progress: bool) -> TrainingRecord:  # fmt: skip
    if log_with is not None:
        accelerator.init_trackers("hfdetox", config={k: str(v) for k, v in method.settings().items()})
    engine = Engine(accelerator, pixels, seed=options.seed, checkpoints=run.checkpoints if run else None, progress=progress)
    record = engine.run(classifier.network, method.phases(classifier.model))
    if log_with is not None:
        accelerator.end_training()
    return record


def _open_report(options: RunOptions, classifier: Classifier, images: Images, method: DefenseConfig, preset: str, before: Outcome,
                 accelerator: Accelerator, push_to: str | None, notes: Notes) -> Report:  # fmt: skip
    return Report(
        hfdetox_version=hfdetox.__version__, model=classifier.info, dataset=images.info,
        defense=DefenseInfo(
            name=method.name, preset=None if options.settings else preset, parameters=method.settings(), layers=method.selected_layers(classifier.model),
            epochs=0, steps=0, seconds=0.0, images_per_second=0.0, precision=accelerator.mixed_precision,
            devices=describe_devices(accelerator)),
        before=before.measurement, after=None, defense_effectiveness_rating=None, history=[],
        output=OutputInfo(pushed_to=push_to),
        environment=describe_environment(accelerator.device, seed=options.seed, command=options.command()),
        warnings=notes.texts,
    )  # fmt: skip


def _close_report(report: Report, record: TrainingRecord, before: Outcome, after: Outcome, seed: int) -> Report:
    done = replace(report.defense, epochs=record.epochs, steps=record.steps, seconds=record.seconds,
                   images_per_second=record.images_per_second, precision=record.precision)  # fmt: skip
    return replace(report, defense=done, after=after.measurement, history=record.history,
                   defense_effectiveness_rating=ratings(before, after, seed=seed) or None)  # fmt: skip


def _exhibits(classifier: Classifier, images: Images, evaluation: Evaluation, options: RunOptions) -> Exhibits:
    info = images.info
    on_hub = info.revision is not None
    probe = None
    if evaluation.clean.images is not None:
        probe = evaluation.clean.images[:CHECKED_IMAGES].cpu()
    return Exhibits(
        triggers=[view.trigger for view in evaluation.views], source_card=classifier.card_source(), probe=probe,
        dataset_eval_yaml=read_text_file(info.id, "eval.yaml", info.revision, "dataset") if on_hub and info.revision else None,
        whole_split=options.eval_samples is None,
    )  # fmt: skip


def _selected_weights(classifier: Classifier, method: DefenseConfig) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    weights = {}
    for name in method.selected_layers(classifier.model):
        weight = classifier.model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        weights[name] = weight.detach().float().cpu().numpy().copy()
    return weights


def _hub_name(images: Images) -> str | None:
    return images.info.id if images.info.revision else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)
