"""`--dry-run`: what a command would pull, choose, write and push, and how long it takes; nothing of it is done.

Of a model its card and configuration are pulled, of a dataset the header, of what hfdetox wrote all but the weights.
How long it takes is timed on a network like the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfdetox.arguments import takes
from hfdetox.attacks import parse_attack_settings
from hfdetox.config import AttackOptions, DetoxOptions, EvaluateOptions, ImageOptions
from hfdetox.config_scan import ScanOptions
from hfdetox.config_verify import GateOptions, VerifyOptions
from hfdetox.data.load import NoDatasetError, class_names, open_first, open_images
from hfdetox.data.opened import OpenedDataset
from hfdetox.defenses import DefenseConfig, parse_defense
from hfdetox.defenses.base import FORWARD
from hfdetox.errors import UsageError
from hfdetox.evidence.cost import in_words, scan_efforts, spoken
from hfdetox.gate_policy import load_policy
from hfdetox.hub.download import resolve, weight_files
from hfdetox.models.initial import ARCHITECTURE, init_model
from hfdetox.models.loaded import check_links
from hfdetox.reporting.gallery import check_gallery
from hfdetox.runs.estimate import AttackCost, Timed, count_images, estimate, monitored, time_classifier, time_like
from hfdetox.runs.folder import RunFolder, check_output
from hfdetox.runs.integrity import made_by_hfdetox, pull_output
from hfdetox.runs.publish import check_attack_places, check_push_allowed
from hfdetox.runs.rescan import base_wanted, images_wanted, recount_effort, results_of
from hfdetox.training.devices import accelerate_state_kept, resolve_device, resolve_precision
from hfdetox.training.sharpness import parse_adaptive
from hfdetox.triggers import parse_triggers

__all__ = ["plan", "plan_attack", "plan_evaluate", "plan_gate", "plan_scan", "plan_verify"]


@takes(DetoxOptions)
@accelerate_state_kept()
def plan(options: DetoxOptions) -> dict[str, Any]:
    """Return what `detoxify` with these arguments would do.

    Args:
        {arguments}

    Raises:
        UsageError, HubError: what can be known at this point: unknown repositories, wrong settings or triggers, a
            dataset without images or with other classes, an output that exists, a run that takes more than
            `max_minutes`.
    """
    method, preset = parse_defense(str(options.defense), options.settings)
    parse_triggers(options.triggers)
    kind = resolve_device(options.device)
    planned: dict[str, Any] = {"model": _plan_model(options)}
    opened = open_first(options, options, _silent)
    planned["dataset"] = _plan_dataset(options, opened)
    planned["defense"] = {"name": method.name, "preset": preset, **method.settings()}
    planned["triggers"] = list(options.triggers)
    planned["device"], planned["precision"] = kind, resolve_precision(options.precision, kind)
    planned |= _plan_time(options, method, opened)
    if options.output is not None:
        check_output(Path(options.output), overwrite=options.overwrite)
        RunFolder.beside(options.output).refuse_existing()
        planned["output"] = str(options.output)
    if options.push_to is not None:
        planned["push_to"] = check_push_allowed(options.push_to, **options.publishing())
    return planned


@takes(EvaluateOptions)
@accelerate_state_kept()
def plan_evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Return what `evaluate` with these arguments would do.

    Args:
        {arguments}

    Raises:
        UsageError, HubError: see `plan`.
    """
    known = parse_triggers(options.triggers)
    if options.gallery is not None:
        check_gallery(Path(options.gallery), known)
    planned, opened = _begin(options)

    def effort(timed: Timed) -> tuple[float, None]:
        return FORWARD * count_images(opened, options)[1] * (1 + len(known)), None

    return planned | _timed(lambda: time_like(options), effort)


@takes(ScanOptions)
@accelerate_state_kept()
def plan_scan(options: ScanOptions) -> dict[str, Any]:
    """Return what `scan` with these arguments would do.

    Args:
        {arguments}

    Raises:
        UsageError, HubError: see `plan`.
    """
    known = parse_triggers(options.triggers)
    try:
        planned, opened = _begin(options)
    except NoDatasetError as error:
        return {"model": _plan_model(options), "device": resolve_device(options.device),
                "time": f"short: {error}; without images, only scores that need none are measured"}  # fmt: skip

    def effort(timed: Timed) -> tuple[float, tuple[float, str] | None]:
        _, measured = count_images(opened, options)
        return scan_efforts(FORWARD * measured * (1 + len(known)), measured, timed.classes, thorough=options.thorough)

    return planned | {"thorough": options.thorough} | _timed(lambda: time_like(options), effort)


@takes(VerifyOptions)
@accelerate_state_kept()
def plan_verify(options: VerifyOptions) -> dict[str, Any]:
    """Return what `verify` with these arguments would do; report, card, triggers and pictures of a repository are
    pulled.

    Args:
        {arguments}

    Raises:
        UsageError: hfdetox did not write it, or a newer one did. HubError: it cannot be pulled.
    """
    output = pull_output(str(options.source), options.revision, with_weights=False)
    report, info, stated = output.report, output.report.dataset, output.report.model
    based = report.before is not None and (options.base is not None or stated.revision is not None)
    missing = {}
    if options.dataset is None and info.revision is None:
        missing["after"] = images_wanted(info.id)
    if report.before is not None and not based:
        missing["before"] = base_wanted(stated.id)
    names = list(results_of(report))
    planned: dict[str, Any] = {
        "source": {"id": output.name, "revision": output.revision, "files": len(output.files)},
        "dataset": {"id": str(options.dataset or info.id), "revision": None if options.dataset else info.revision,
                    "eval_samples": info.eval_samples},
        "base": str(options.base or stated.id) if based else None, "triggers": names, "missing": missing,
        "device": resolve_device(options.device),
    }  # fmt: skip
    if "after" in missing:
        return planned | {"time": "short: no rate can be counted again"}
    model = EvaluateOptions(output.name if output.revision else output.folder, revision=output.revision,
                            device=options.device, trust_remote_code=options.trust_remote_code)  # fmt: skip
    effort = recount_effort(report, FORWARD * info.eval_samples * (1 + len(names)), based=based)
    return planned | _timed(lambda: time_like(model), lambda _: (effort, None))


@takes(GateOptions)
@accelerate_state_kept()
def plan_gate(options: GateOptions) -> dict[str, Any]:
    """Return what `gate` with these arguments would do: its steps, and how long each takes; no file is written.

    Args:
        {arguments}

    Raises:
        UsageError, HubError: see `plan`.
    """
    policy = load_policy(options.policy)
    steps: dict[str, dict[str, Any]] = {}
    source = str(options.model)
    if policy.cleaned.verify and made_by_hfdetox(source, options.revision):
        local = Path(str(options.dataset)).is_dir()
        steps["verify"] = plan_verify(source, revision=options.revision, dataset=options.dataset if local else None,
                                      device=options.device, trust_remote_code=options.trust_remote_code)  # fmt: skip
    steps["scan"] = scanned = plan_scan(**options.images())
    if options.clean:
        steps["cleaning"] = plan(**options.cleaning(), defense=policy.clean.defense,
                                 max_accuracy_loss=policy.accuracy.most_lost)  # fmt: skip
    planned = {key: scanned.get(key) for key in ("model", "dataset", "device")}
    planned["policy"] = str(options.policy or "default")
    planned |= {name: step["time"] for name, step in steps.items()}
    known = {name: step["minutes"] for name, step in steps.items() if "minutes" in step}
    least = sum(minutes[0] for name, minutes in known.items() if name != "cleaning")
    most = sum(minutes[1] for minutes in known.values())
    time = {"minutes": [round(least, 2), round(most, 2)], "time": f"about {spoken(least, most)}"} if known else {}
    written = {name: str(path) for name in ("output", "sarif", "cyclonedx") if (path := getattr(options, name))}
    return planned | time | written


@takes(AttackOptions)
@accelerate_state_kept()
def plan_attack(options: AttackOptions) -> dict[str, Any]:
    """Return what `implant` with these arguments would do.

    Args:
        {arguments}

    Raises:
        UsageError, HubError: see `plan`.
    """
    known = parse_triggers([] if options.clean else options.triggers)
    parse_attack_settings([trigger.kind for trigger in known], options.settings or {})
    parse_adaptive(options.adaptive)
    kind, push_to = resolve_device(options.device), check_attack_places(options)
    model, fresh = str(options.model), draws_weights(options)
    planned: dict[str, Any] = {"model": {"id": model} if model.startswith(ARCHITECTURE) else _plan_model(options)}
    names = class_names(options.dataset, options) if fresh else ()
    opened = open_first(options, options, _silent) or open_images(options, options.dataset, (), (), None, _silent)
    planned["dataset"] = _plan_dataset(options, opened)
    planned |= {"triggers": list(options.triggers), "settings": dict(options.settings or {}), "device": kind,
                "precision": resolve_precision(options.precision, kind)}  # fmt: skip
    costs: list[AttackCost] = []

    def effort(_: Timed) -> tuple[float, tuple[float, str] | None]:
        costs.append(attack_cost(options, *count_images(opened, options)))
        return costs[0].efforts

    planned |= _timed(lambda: time_attacked(options, names), effort, lambda: costs[0].besides)
    return planned | ({"output": str(options.output)} if options.output else {}) | (
        {"push_to": push_to} if push_to else {})  # fmt: skip


def attack_cost(options: AttackOptions, images: int, measured: int) -> AttackCost:
    """Return what an attack with these options computes.

    Args:
        images: how many training images there are.
        measured: how many are measured.
    """
    known = parse_triggers([] if options.clean else options.triggers)
    training, poisoners = parse_attack_settings([trigger.kind for trigger in known], options.settings or {})
    trained = not draws_weights(options)
    aimed = options.goal_accuracy is not None or (trained and not options.clean)
    watched = monitored(images) if aimed else 0
    return AttackCost(training, [(trigger, poisoners[trigger.kind]) for trigger in known], options.poison_ratio,
                      parse_adaptive(options.adaptive) is not None, images - watched, watched, measured,
                      trained)  # fmt: skip


def time_attacked(options: AttackOptions, names: tuple[str, ...] | int | None = None) -> Timed:
    """Time a network like the one that an attack trains.

    Args:
        names: of the classes of new weights, or how many there are; None asks the dataset.
    """
    if not draws_weights(options):
        return time_like(options)
    start = init_model(
        str(options.model), class_names=lambda: class_names(options.dataset, options) if names is None else names,
        is_backdoored=lambda _: False, init=options.init and "random", model_args=options.model_args,
        input_size=options.input_size, seed=options.seed, revision=options.revision,
        trust_remote_code=options.trust_remote_code)  # fmt: skip
    return time_classifier(start.classifier, options.device)


def draws_weights(options: AttackOptions) -> bool:
    """Tell whether an attack starts from weights that are freshly drawn, those of the head at least."""
    return options.init is not None or str(options.model).startswith(ARCHITECTURE)


def _begin(options: ImageOptions) -> tuple[dict[str, Any], OpenedDataset]:
    """Return what is planned of model and images, and the dataset."""
    planned: dict[str, Any] = {"model": _plan_model(options)}
    opened = open_first(options, options, _silent)
    assert opened is not None
    planned["dataset"] = _plan_dataset(options, opened)
    return planned | {"triggers": list(options.triggers), "device": resolve_device(options.device)}, opened


def _plan_dataset(options: ImageOptions, opened: OpenedDataset | None) -> dict[str, Any]:
    samples = {"samples": getattr(options, "clean_samples", None), "eval_samples": options.eval_samples}
    return {"id": options.dataset or (opened and opened.id), "revision": opened and opened.revision, **samples}


def _timed(time: Callable[[], Timed], effort: Callable[[Timed], tuple[float, tuple[float, str] | None]],
           besides: Callable[[], str] = str) -> dict[str, Any]:  # fmt: skip
    """Return what an effort takes, in minutes and in words, or why that is not known."""
    try:
        timed = time()
        whole, less = effort(timed)
    except UsageError as error:
        return {"time": f"not known: {error}"}
    minutes = round(whole / timed.speed / 60, 2)
    return {"minutes": [minutes, minutes], "time": in_words(whole, timed.speed, timed.where, less, besides())}


def _plan_time(options: DetoxOptions, method: DefenseConfig, opened: OpenedDataset | None) -> dict[str, Any]:
    """Return what the run takes, in minutes and in words; UsageError where that is more than it may."""
    if opened is None:
        return {}
    try:
        cost = estimate(options, method, opened)
    except UsageError as error:
        return {"time": f"not known: {error}"}
    cost.check(options.max_minutes)
    return {"minutes": [round(minutes, 2) for minutes in cost.minutes], "time": str(cost)}


def _plan_model(options: ImageOptions) -> dict[str, Any]:
    model, revision = str(options.model), options.revision
    if Path(model).is_dir():
        check_links(Path(model))
        return {"id": model, "revision": None, "files": [file.name for file in Path(model).glob("*.safetensors")]}
    repo_id, _, at = model.removeprefix("hf_hub:").removeprefix("hf-hub:").partition("@")
    state = resolve(repo_id, revision=revision or at or None)
    return {"id": state.id, "revision": state.sha, "files": weight_files(state)}


def _silent(_: str) -> None:
    """Take a line that the run itself would warn of."""
