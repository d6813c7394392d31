"""Reads suite files: short YAML, every key known, every value of its type, before anything is run or written.

dataset: uoft-cs/cifar10                # or {id: …, image_column: …, …}; --dataset is used instead of the id
training: {epochs: 10}                  # --set values of all cells
models:
  small: {model: "timm-arch:resnetv2_50", model_args: {layers: [1, 1, 1]}, input_size: 32, settings: {epochs: 12}}
triggers:                               # names for specifications with settings of their own
  ssba: {spec: "ssba:bits=32", settings: {encoder_epochs: 4}}
grids:                                  # each is models × triggers × ratios × seeds (× targets × adaptive)
  - {models: [small], triggers: [none, badnets, ssba], ratios: [0.1, 0.01], seeds: [0]}
# for the bench; without `bench` it tries every defense on every attacked model of the grids
defenses: {d3: d3:paper, strong: {defense: d3, settings: {lambda: 2}}}
subjects:                               # models that are not of the zoo, and what is known of their triggers
  hub: {model: org/model, triggers: ["badnets:size=3"], target: cat}
bench:                                  # models × defenses × clean images × seeds; model_seeds are those of the zoo
  - {models: [small], triggers: [badnets, ssba], ratios: [0.1], defenses: [d3, strong, ft], seeds: [0, 1, 2]}
  - {subjects: [hub], defenses: [d3], samples: [0.05, 500]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from hfdetox.bench.suite import (
    BenchEntry,
    DatasetEntry,
    DefenseEntry,
    GridEntry,
    ModelEntry,
    SubjectEntry,
    Suite,
    TriggerEntry,
)
from hfdetox.bench.suite_yaml import SuiteError, read_yaml
from hfdetox.config import NONE
from hfdetox.defenses import parse_defense
from hfdetox.errors import UsageError
from hfdetox.triggers import parse_triggers

_SHOWN = 60  # letters of a wrong value that a message shows
_SCALARS = (str, int, float, bool)

Item = TypeVar("Item")


def load_suite(file: Path) -> Suite:
    """Read and check a suite file; paths in it are relative to the working directory, as on the command line.

    Raises:
        SuiteError: it cannot be read, is no YAML, has an unknown or missing key, a value of the wrong type or range,
            or names a model, trigger or defense that there is not; or two of its cells are the same.
    """
    known = {f.name for f in fields(Suite)} - {"file"}
    content = _fields(f"{file}: the suite", read_yaml(file), known)
    # a bench of models that are there needs neither
    for key in ("models", "grids") if "subjects" not in content or "grids" in content else ():
        if key not in content:
            raise SuiteError(f"{file}: the suite: {key} is missing")
    where = f"{file}: "
    models = {name: _model(f"{where}models.{name}", item)
              for name, item in _named(f"{where}models", content.get("models", {})).items()}  # fmt: skip
    triggers = {name: _trigger(f"{where}triggers.{name}", item)
                for name, item in _named(f"{where}triggers", content.get("triggers", {})).items()}  # fmt: skip
    if NONE in triggers:
        raise SuiteError(f"{where}triggers.none: none is the clean baseline's; choose another name")
    defenses = {name: _defense(f"{where}defenses.{name}", item)
                for name, item in _named(f"{where}defenses", content.get("defenses", {})).items()}  # fmt: skip
    subjects = {name: _subject(f"{where}subjects.{name}", item)
                for name, item in _named(f"{where}subjects", content.get("subjects", {})).items()}  # fmt: skip

    def grid(place: str, item: Any) -> GridEntry:
        return _grid(place, item, models, triggers)

    def bench(place: str, item: Any) -> BenchEntry:
        return _bench(place, item, grid, subjects, defenses)

    grids = _list(f"{where}grids", content["grids"], grid) if "grids" in content else []
    suite = Suite(
        file=file,
        dataset=_dataset(f"{where}dataset", content.get("dataset", {})),
        training=_settings(f"{where}training", content.get("training", {})),
        models=models,
        triggers=triggers,
        grids=tuple(grids),
        defenses=defenses,
        subjects=subjects,
        bench=tuple(_list(f"{where}bench", content["bench"], bench)) if "bench" in content else (),
    )
    suite.cells()
    if suite.dataset.samples is not None and not suite.grids:
        raise SuiteError(f"{where}dataset.samples is for the attacks of grids, and there are none; the clean images of "
                         "a defense are `samples` under bench")  # fmt: skip
    return suite


def _fields(where: str, value: Any, known: set[str], *, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Return a mapping whose keys are all `known` and that has those `needed`."""
    if not isinstance(value, dict):
        raise SuiteError(f"{where} must be a mapping with {', '.join(sorted(known))}, got {_shown(value)}")
    unknown = [key for key in value if key not in known]
    if unknown:
        raise SuiteError(f"{where}: unknown key {_shown(unknown[0])}; known: {', '.join(sorted(known))}")
    missing = [key for key in needed if key not in value]
    if missing:
        raise SuiteError(f"{where}: {missing[0]} is missing")
    return value


def _named(where: str, value: Any) -> dict[str, Any]:
    """Return a mapping of names to entries."""
    if not isinstance(value, dict):
        raise SuiteError(f"{where} must map names to entries, got {_shown(value)}")
    for name in value:
        if not isinstance(name, str) or not name.strip():
            raise SuiteError(f"{where}: the name {_shown(name)} is not text; put it in quotes")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SuiteError(f"{where} must be text, got {_shown(value)}; put it in quotes")
    return value


def _settings(where: str, value: Any) -> dict[str, str]:
    """Return `--set` values as texts."""
    if not isinstance(value, dict):
        raise SuiteError(f"{where} must map settings to values, got {_shown(value)}")
    return {_text(f"{where}: the key", key).replace("-", "_"): _setting(f"{where}.{key}", item)
            for key, item in value.items()}  # fmt: skip


def _setting(where: str, value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, _SCALARS) for item in items):
        raise SuiteError(f"{where} must be a number, text, true, false or a list of these, got {_shown(value)}")
    return ",".join(_word(item) for item in items)


def _word(value: Any) -> str:
    if value is None:
        return NONE
    return str(value).lower() if isinstance(value, bool) else str(value)


def _whole(where: str, value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SuiteError(f"{where} must be a whole number of at least {least}, got {_shown(value)}")
    return value


def _dataset(where: str, value: Any) -> DatasetEntry:
    if isinstance(value, str):
        return DatasetEntry(id=_text(where, value))
    known = {f.name for f in fields(DatasetEntry)}
    entry = _fields(where, value, known)
    return DatasetEntry(**{key: _COUNTS.get(key, _text)(f"{where}.{key}", item) for key, item in entry.items()})


def _model(where: str, value: Any) -> ModelEntry:
    if isinstance(value, str):
        return ModelEntry(model=_text(where, value))
    entry = _fields(where, value, {f.name for f in fields(ModelEntry)}, needed=["model"])
    arguments = entry.get("model_args", {})
    if not isinstance(arguments, dict):
        raise SuiteError(f"{where}.model_args must map arguments to values, got {_shown(arguments)}")
    for key, item in arguments.items():
        _text(f"{where}.model_args: the key", key)
        if not all(isinstance(part, _SCALARS) for part in (item if isinstance(item, list) else [item])):
            raise SuiteError(f"{where}.model_args.{key} must be a number, text, true, false or a list of these, "
                             f"got {_shown(item)}")  # fmt: skip
    if "init" in entry and entry["init"] != "random":
        raise SuiteError(f"{where}.init must be random or left out, got {_shown(entry['init'])}")
    return ModelEntry(
        model=_text(f"{where}.model", entry["model"]),
        model_args=arguments,
        input_size=_whole(f"{where}.input_size", entry["input_size"]) if "input_size" in entry else None,
        init=entry.get("init"),
        settings=_settings(f"{where}.settings", entry.get("settings", {})),
    )


def _trigger(where: str, value: Any) -> TriggerEntry:
    entry = {"spec": value} if isinstance(value, str) else _fields(where, value, {"spec", "settings"}, needed=["spec"])
    spec = entry["spec"]
    specs = tuple(_list(f"{where}.spec", spec, _text)) if isinstance(spec, list) else (_text(f"{where}.spec", spec),)
    _checked(where, lambda: parse_triggers(specs))
    return TriggerEntry(specs=specs, settings=_settings(f"{where}.settings", entry.get("settings", {})))


def _grid(where: str, value: Any, models: Mapping[str, Any], triggers: Mapping[str, Any]) -> GridEntry:
    entry = _fields(where, value, {f.name for f in fields(GridEntry)}, needed=["models", "triggers"])
    names = _list(f"{where}.models", entry["models"], _text)
    for name in names:
        if name not in models:
            raise SuiteError(f"{where}.models: unknown model {_shown(name)}; the suite has {', '.join(models)}")
    specs = _list(f"{where}.triggers", entry["triggers"], _text)
    for spec in specs:
        if spec != NONE and spec not in triggers:
            _checked(f"{where}.triggers", lambda spec=spec: parse_triggers([spec]))  # type: ignore[misc]
    return GridEntry(
        models=tuple(names),
        triggers=tuple(specs),
        **{key: tuple(_list(f"{where}.{key}", entry[key], read)) for key, read in _AXES.items() if key in entry},
    )


def _ratio(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise SuiteError(f"{where} must be above 0 and at most 1, such as 0.1, got {_shown(value)}")
    return float(value)


def _target(where: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(_whole(where, value, 0))
    return _text(where, value)


def _adaptive(where: str, value: Any) -> str | None:
    return None if value is None or _text(where, value) == NONE else value


_COUNTS: dict[str, Callable[[str, Any], Any]] = {
    # as on the command line, a number with a point is a share
    "samples": lambda where, value: _ratio(where, value) if isinstance(value, float) else _whole(where, value),
    "eval_samples": _whole,
}
_AXES: dict[str, Callable[[str, Any], Any]] = {
    "ratios": _ratio, "seeds": lambda where, value: _whole(where, value, 0), "targets": _target, "adaptive": _adaptive,
}  # fmt: skip


def _defense(where: str, value: Any) -> DefenseEntry:
    entry = {"defense": value} if isinstance(value, str) else value
    entry = _fields(where, entry, {f.name for f in fields(DefenseEntry)}, needed=["defense"])
    spec = _text(f"{where}.defense", entry["defense"])
    settings = _settings(f"{where}.settings", entry.get("settings", {}))
    _checked(where, lambda: parse_defense(spec, settings))
    return DefenseEntry(defense=spec, settings=settings)


def _subject(where: str, value: Any) -> SubjectEntry:
    if isinstance(value, str):
        return SubjectEntry(model=_text(where, value))
    entry = _fields(where, value, {f.name for f in fields(SubjectEntry)}, needed=["model"])
    specs = _list(f"{where}.triggers", entry["triggers"], _text) if "triggers" in entry else []
    _checked(f"{where}.triggers", lambda: parse_triggers(specs))
    return SubjectEntry(
        model=_text(f"{where}.model", entry["model"]),
        revision=_text(f"{where}.revision", entry["revision"]) if "revision" in entry else None,
        triggers=tuple(specs),
        target=_target(f"{where}.target", entry["target"]) if "target" in entry else None,
    )


def _bench(where: str, value: Any, grid: Callable[[str, Any], GridEntry], subjects: Mapping[str, Any],
           defenses: Mapping[str, Any]) -> BenchEntry:  # fmt: skip
    own = {"subjects", "defenses", "samples", "seeds"}
    of_grid = {f.name for f in fields(GridEntry)} - {"seeds"} | {"model_seeds"}
    entry = _fields(where, value, own | of_grid, needed=["defenses"])
    names = _list(f"{where}.subjects", entry["subjects"], _text) if "subjects" in entry else []
    for name in names:
        if name not in subjects:
            raise SuiteError(f"{where}.subjects: unknown subject {_shown(name)}; the suite has {', '.join(subjects)}")
    specs = _list(f"{where}.defenses", entry["defenses"], _text)
    for spec in specs:
        if spec not in defenses:
            _checked(f"{where}.defenses", lambda spec=spec: parse_defense(spec))  # type: ignore[misc]
    cells = {"seeds" if key == "model_seeds" else key: item for key, item in entry.items() if key in of_grid}
    if not cells and not names:
        raise SuiteError(f"{where}: name models and triggers of the zoo, or subjects")
    axes = {key: tuple(_list(f"{where}.{key}", entry[key], read))
            for key, read in (("samples", _COUNTS["samples"]), ("seeds", _AXES["seeds"])) if key in entry}  # fmt: skip
    return BenchEntry(defenses=tuple(specs), grid=grid(where, cells) if cells else None, subjects=tuple(names), **axes)


def _list(where: str, value: Any, read: Callable[[str, Any], Item]) -> list[Item]:
    """Return the items of a list that is neither empty nor has an item twice, each as `read` gives it."""
    if not isinstance(value, list) or not value:
        raise SuiteError(f"{where} must be a list with at least one entry, got {_shown(value)}")
    items = [read(f"{where}[{i}]", item) for i, item in enumerate(value)]
    twice = [item for i, item in enumerate(items) if item in items[:i]]
    if twice:
        raise SuiteError(f"{where}: {_shown(twice[0])} is there twice")
    return items


def _checked(where: str, parse: Callable[[], object]) -> None:
    try:
        parse()
    except UsageError as error:
        raise SuiteError(f"{where}: {error}") from error


def _shown(value: Any) -> str:
    text = ascii(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
