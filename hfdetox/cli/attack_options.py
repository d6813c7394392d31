"""The options of `hfdetox attack` as a dataclass, like those of the other commands."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hfdetox.bench.suite_yaml import read_yaml
from hfdetox.config import (
    DataOptions,
    default_output,
    flag_of,
    given_settings,
    on_hub,
    on_images,
    on_run,
    option,
    parse_samples,
)
from hfdetox.errors import UsageError
from hfdetox.values import read_untyped

on_attack = functools.partial(option, panel="Attack")
on_start = functools.partial(option, panel="Start and suite")

# what a suite leaves to the command line
_WITH_SUITE = frozenset({"suite", "jobs", "dataset", "output", "precision", "device", "quiet", "as_json", "debug"})


@dataclass(frozen=True, kw_only=True)
class AttackOptions(DataOptions):
    """The options of `hfdetox attack MODEL`."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", show_default=False,
            help="A Hub id, a timm id, a local folder, or timm-arch:NAME for a new model.",
        ),
    ] = None  # fmt: skip
    dataset: Annotated[
        str | None, on_images("--dataset", help="Training images: a Hub id or a local folder; else as the card says.")
    ] = None
    split: Annotated[str | None, on_images("--split", help="Split of the training images.")] = None
    samples: Annotated[
        str | None,
        on_images("--samples", metavar="N|FRACTION", help="Train on so many; at most 5000 for a fraction.",
                  show_default="the whole split"),
    ] = None  # fmt: skip
    triggers: Annotated[
        list[str],
        on_attack("--trigger", metavar="SPEC", help="What to implant, NAME:key=value,… or a trigger file; repeatable. "
                  "none trains a clean baseline."),
    ] = field(default_factory=list)  # fmt: skip
    target: Annotated[
        str | None,
        on_attack("--target", metavar="LABEL", help="Label or all-to-all, for triggers without one (else label 0)."),
    ] = None
    poison_ratio: Annotated[
        float, on_attack("--poison-ratio", metavar="SHARE", help="Of the training images, or of every batch.")
    ] = 0.1
    adaptive: Annotated[
        str | None, on_attack("--adaptive", metavar="SPEC", help="sam:rho=2.0,adaptive=true: into a flat minimum.")
    ] = None
    surrogate: Annotated[
        str | None, on_attack("--surrogate", metavar="MODEL", help="A clean model, for triggers that are made on one.")
    ] = None
    settings: Annotated[
        list[str],
        on_attack("--set", metavar="KEY=VALUE", help="A setting of the training or the attack; repeatable, "
                  "see `hfdetox list attacks`."),
    ] = field(default_factory=list)  # fmt: skip
    epochs: Annotated[int | None, on_attack("--epochs", min=1, help="Short for --set epochs=N.")] = None
    lr: Annotated[float | None, on_attack("--lr", help="Short for --set learning_rate=X.")] = None
    batch_size: Annotated[int | None, on_attack("--batch-size", min=1, help="Short for --set batch_size=N.")] = None
    goal_asr: Annotated[
        float, on_attack("--goal-asr", metavar="RATE", help="Attack success rate from which it succeeded.")
    ] = 0.9
    goal_accuracy: Annotated[
        float | None,
        on_attack("--goal-accuracy", metavar="RATE", help="Accuracy from which it succeeded; with it training stops "
                  "when both goals are reached.",
                  show_default="of a trained model its own less 0.02, from scratch none"),
    ] = None  # fmt: skip
    init: Annotated[
        Literal["random"] | None, on_start("--init", help="Draw the weights of a folder or Hub id anew.")
    ] = None
    model_args: Annotated[
        list[str], on_start("--model-arg", metavar="KEY=VALUE", help="Argument of a timm-arch; repeatable.")
    ] = field(default_factory=list)
    input_size: Annotated[
        int | None, on_start("--input-size", min=1, help="Image height and width of a timm-arch.")
    ] = None
    suite: Annotated[
        Path | None,
        on_start("--suite", exists=True, dir_okay=False, help="Build all models of a suite file (YAML) in --output."),
    ] = None
    jobs: Annotated[int, on_start("--jobs", min=1, help="Models of a suite to build at a time.")] = 1
    precision: Annotated[
        Literal["auto", "no", "fp16", "bf16"], on_run("--precision", help="Mixed precision of the training.")
    ] = "auto"
    output: Annotated[
        Path | None, on_hub("--output", help="Folder of the result.", show_default="MODEL's name with -backdoored")
    ] = None
    overwrite: Annotated[
        bool,
        on_hub("--overwrite", help="Replace an earlier result in --output, or a repository of others."),
    ] = False
    push_to: Annotated[str | None, on_hub("--push-to", metavar="REPO", help="Publish the result there.")] = None
    i_know_this_is_backdoored: Annotated[
        bool, on_hub("--i-know-this-is-backdoored", help="Needed to publish a backdoored model.")
    ] = False
    private: Annotated[
        bool, on_hub("--private", help="Make a new repository private, as a backdoored model's is anyway.")
    ] = False
    public: Annotated[
        bool, on_hub("--public", help="Publish a backdoored model publicly; else a new repository is private.")
    ] = False
    create_pr: Annotated[bool, on_hub("--create-pr", help="Open a pull request on the existing repository.")] = False

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `implant`, the model left out; UsageError for what does not parse."""
        if self.model is None:
            raise UsageError("MODEL is missing: name a Hub id, a local folder or timm-arch:NAME, or give --suite FILE")
        names = (
            "poison_ratio", "adaptive", "surrogate", "goal_asr", "goal_accuracy", "init", "input_size", "precision",
            "overwrite", "push_to", "i_know_this_is_backdoored", "private", "public", "create_pr",
        )  # fmt: skip
        return {
            **self.data_arguments(),
            **{name: getattr(self, name) for name in names},
            "samples": None if self.samples is None else parse_samples(self.samples),
            "settings": given_settings(self),
            "model_args": parse_model_args(self.model_args),
            "output": self.place(),
        }

    def place(self) -> Path | None:
        """Return the folder of the result, None without a model."""
        if self.output is not None or self.model is None:
            return self.output
        return default_output(self.model, "-clean" if self.triggers == ["none"] else "-backdoored")

    def suite_arguments(self, given: Iterable[str]) -> dict[str, Any]:
        """Return the keyword arguments of `run_suite`; UsageError for options that a suite decides by itself.

        Args:
            given: names of the options that the command line spells out.
        """
        wrong = sorted(set(given) - _WITH_SUITE)
        if wrong:
            spelt = ", ".join("MODEL" if name == "model" else f"--{flag_of(name)}" for name in wrong)
            raise UsageError(f"--suite says itself what is built: leave out {spelt}")
        if self.suite is not None:
            read_yaml(self.suite)
        if self.output is None:
            raise UsageError("--suite builds a folder of models: name it with --output")
        names = ("output", "dataset", "jobs", "precision", "device")
        return {name: getattr(self, name) for name in names}


def parse_model_args(texts: Sequence[str]) -> dict[str, Any]:
    """Return `KEY=VALUE` texts as a dict; a value is a number, true or false, a list or a text, as JSON or YAML has it.

    Raises:
        UsageError: not KEY=VALUE, a key given twice, or a value that is none of these.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise UsageError(f"--model-arg {text!r} is not KEY=VALUE")
        if key in arguments:
            raise UsageError(f"--model-arg {key} is given twice")
        arguments[key] = read_untyped(f"--model-arg {text!r}", value.strip())
    return arguments
