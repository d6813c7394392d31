"""Every option, declared once: its name, type, default, check and help.

A field of these dataclasses is an option of the command line (`hfdetox.cli.options`), an argument of `detoxify`,
`evaluate` or `implant` with its documentation (`hfdetox.arguments.takes`), a key of `run.json` (`record`) and a word of
the command that repeats a run (`argv`). Nothing here imports torch or typer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Protocol, Self

from hfdetox.arguments import Options, about, argv, option, options_of
from hfdetox.checks import check_pixel_range, check_points, check_rate, check_samples, check_share, check_there
from hfdetox.errors import UsageError
from hfdetox.specs import redact_paths, target_text
from hfdetox.values import to_text

# a first word that is none of these is a model
COMMANDS = ("attack", "bench", "demo", "detox", "evaluate", "gate", "push", "list", "report", "scan", "verify")
# chosen by examples/d3_heldout.yaml, whose models it was not made on
DEFAULT_DEFENSE = "d3:auto"
DEFAULT_SAMPLES = 0.05
# the trigger of a clean baseline
NONE: Final = "none"

# what the help of a command groups its options under, in its order; an argument of Python alone has none
IMAGES, TRIGGERS, ATTACK, START, DEFENSE, RUN, HUB = PANELS = (
    "Images", "Triggers", "Attack", "Start and suite", "Defense", "Run", "Output and Hub",
)  # fmt: skip

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "no", "fp16", "bf16"]


class NamedTrigger(Protocol):
    """A `Trigger` object: `recorded` returns what `--trigger` makes it of."""

    def recorded(self) -> str: ...


class NamedDefense(Protocol):
    """A `DefenseConfig` object: `settings` returns every setting by its name."""

    def settings(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """The model, the images and the known triggers; every command on a model has them."""

    COMMAND: ClassVar[str]

    model: str | Path | Callable[..., Any] | None = field(default=None, kw_only=False, metadata=about(
        IMAGES, "A Hub id, a timm id (hf_hub:… or timm/…), or a local folder.", metavar="MODEL",
        more="Or a loaded module, then with `processor`, or `preprocessing` and `labels`; see `load_classifier`.",
    ))  # fmt: skip
    dataset: Any = option(None, IMAGES, "Images: a Hub id or a local folder; else what the model's card names.",
                          more="Or a `datasets` object.")  # fmt: skip
    dataset_config: str | None = option(None, IMAGES, "The dataset's configuration.", flag="config", was="config")
    split: str | None = option(None, IMAGES, "Split of the images to train on.")
    eval_split: str | None = option(None, IMAGES, "Split that is measured.")
    image_column: str | None = option(None, IMAGES, "The column of the images.")
    label_column: str | None = option(None, IMAGES, "The column of the labels.")
    pixel_range: str | None = option(
        None, IMAGES, "Stored values of black and white, such as 0,4095.", metavar="LOW,HIGH", check=check_pixel_range,
        shown="0,255, or what the values of wider types tell",
        more="None takes that of 8 bits, and for wider types the least usual range that has all values.",
    )  # fmt: skip
    eval_samples: int | None = option(None, IMAGES, "Measure on so many images.", least=1,
                                      more="They are drawn uniformly; None measures on the whole split.")  # fmt: skip
    label_map: str | Path | None = option(None, IMAGES, "JSON or YAML file: the dataset's label names to the model's.",
                                          path="file")  # fmt: skip
    dataset_revision: str | None = option(None, IMAGES, "The dataset's commit or branch.")
    allow_missing_classes: bool = option(False, IMAGES, "Go on without images of some classes.")
    triggers: Sequence[str | NamedTrigger] = option(
        (), TRIGGERS, "A known trigger, NAME:key=value,… or a trigger file; repeatable.", flag="trigger",
        metavar="SPEC", more="Or `Trigger` objects.",
    )  # fmt: skip
    target: str | int | None = option(
        None, TRIGGERS, "Label, index:N or all-to-all, for triggers that name none (else label 0).", metavar="LABEL",
        more="A text is a label's name, or an index where no label has that name; an int is an index.",
    )  # fmt: skip
    seed: int = option(0, RUN, "Seed of everything random.", least=0)
    device: Device = option("auto", RUN, "Where to run.")
    revision: str | None = option(None, HUB, "The model's commit or branch.")
    trust_remote_code: bool = option(False, HUB, "Run the Python code that the model's repository brings.")
    processor: Any = option(None, None, "Image processor of a loaded transformers model.")
    preprocessing: Any = option(None, None, "Preprocessing of a loaded module, see `load_classifier`.")
    labels: Sequence[str] | int | None = option(None, None, "Labels of a loaded module, or how many there are.")
    accelerator: Any = option(None, None, "An `accelerate.Accelerator` of your own: the run gets its device, mixed "
                              "precision and trackers, and leaves it as it is.")  # fmt: skip
    progress: bool = option(True, None, "Whether bars are drawn.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.triggers, str) or not isinstance(self.triggers, Sequence):
            raise UsageError(f"triggers must be a list such as ['badnets'], got {self.triggers!r}")
        if self.target is not None:
            object.__setattr__(self, "target", target_text(self.target))

    def check(self) -> None:
        """Raise UsageError for options that do not go together."""
        if self.model is None:
            raise UsageError(f"MODEL is missing: name a Hub id or a local folder (see hfdetox {self.COMMAND} --help)")
        for name in ("model", "dataset", "surrogate"):
            check_there(name, getattr(self, name, None))

    def argv(self) -> list[str]:
        """Return the words of the command line that repeats the run, without `hfdetox`.

        Options at their defaults, and those that may be said anew when a run is resumed, are left out.
        """
        known, changed = options_of(self), self.changed()
        said = {one.flag: changed[name] for name, one in known.items()
                if name in changed and name != "model" and one.panel is not None and not one.anew}  # fmt: skip
        command = [] if self.COMMAND == "detox" and self.model not in COMMANDS else [self.COMMAND]
        return [*command, str(self.model), *argv(said)]

    def redact_paths(self) -> Self:
        """Return the options with the last part only of local paths, for publishing."""
        # only what the Hub has is pinned to a revision; an id that is also a folder's name stays an id then
        pinned = {"model": self.revision, "dataset": self.dataset_revision}
        names = [name for name in ("model", "dataset", "label_map", "surrogate") if not pinned.get(name)]
        here: dict[str, Any] = {
            name: redact_paths(value) for name in names if isinstance(value := getattr(self, name, None), str)
        }
        if output := getattr(self, "output", None):
            here["output"] = f"./{Path(output).resolve().name}"
        here["triggers"] = [redact_paths(spec) for spec in map(str, self.triggers)]
        return replace(self, **here)


@dataclass(frozen=True, kw_only=True)
class PublishOptions(Options):
    """How a result is published."""

    private: bool = option(False, HUB, "Make a new repository private.", anew=True)
    create_pr: bool = option(False, HUB, "Open a pull request on the existing repository.", anew=True)
    overwrite: bool = option(False, HUB, "Replace an earlier result, or a repository that hfdetox did not make.",
                             anew=True)  # fmt: skip
    publish_images: bool = option(False, HUB, "Publish pictures of images whose dataset is not public.", anew=True)
    no_verify_upload: bool = option(False, HUB, "Do not read the pushed weights back.", anew=True)

    def publishing(self) -> dict[str, Any]:
        """Return how the result is published, as the keyword arguments of `push_to_hub`."""
        names = ("private", "create_pr", "overwrite", "publish_images", "no_verify_upload", "public",
                 "i_know_this_is_backdoored", "accept_accuracy_loss")  # fmt: skip
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


@dataclass(frozen=True, kw_only=True)
class CleanedPublishOptions(PublishOptions):
    """How a cleaned model is published."""

    accept_accuracy_loss: bool = option(False, HUB, "Publish a model that was rejected for its accuracy.", anew=True)


@dataclass(frozen=True, kw_only=True)
class AttackPublishOptions(PublishOptions):
    """How a backdoored model is published."""

    i_know_this_is_backdoored: bool = option(False, HUB, "Needed to publish a backdoored model.", anew=True)
    public: bool = option(False, HUB, "Publish a backdoored model publicly; else a new repository is private.",
                          anew=True)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnyPublishOptions(CleanedPublishOptions, AttackPublishOptions):
    """How a folder is published, whatever is in it."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(PublishOptions, ImageOptions):
    """What makes a model has these too: how it is trained, where it goes."""

    settings: Mapping[str, Any] | None = option(
        None, RUN, "A setting of the defense or the attack, see `hfdetox list`; repeatable.", flag="set",
        metavar="KEY=VALUE",
    )  # fmt: skip
    precision: Precision = option("auto", RUN, "Mixed precision of the training.",
                                  more="`auto` is what Accelerate's configuration names, else the best of the "
                                  "hardware. Measuring is always float32.")  # fmt: skip
    output: str | Path | None = option(None, HUB, "Folder of the result.", path="new", shown="named after MODEL",
                                       more="None keeps it in memory.")  # fmt: skip
    push_to: str | None = option(None, HUB, "Publish the result there.", metavar="REPO", anew=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.settings or {}).items()
        object.__setattr__(self, "settings", {k: v if isinstance(v, str) else to_text(v) for k, v in given})

    def check(self) -> None:
        """Raise UsageError for options that do not go together."""
        super().check()
        self.check_publishing()

    def check_publishing(self) -> None:
        """Raise UsageError when it is said how to publish and not where."""
        ways = [f"--{name.replace('_', '-')}" for name in ("private", "public", "create_pr") if hasattr(self, name)]
        if self.push_to is None and (self.private or self.create_pr or getattr(self, "public", False)):
            raise UsageError(f"{', '.join(ways[:-1])} and {ways[-1]} say how to publish: name the repository with "
                             "--push-to")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DetoxOptions(CleanedPublishOptions, TrainingOptions):
    """The options of `hfdetox MODEL`, the arguments of `detoxify`: what decides a cleaning run and where it goes."""

    COMMAND = "detox"

    clean_samples: int | float = option(
        DEFAULT_SAMPLES, IMAGES, "Clean images of the defense: a fraction with a point, or a count.", flag="samples",
        metavar="N|FRACTION", was="samples", check=check_samples, more="A fraction gives at most 5000.",
    )  # fmt: skip
    defense: str | NamedDefense = option(
        DEFAULT_DEFENSE, DEFENSE, "See `hfdetox list defenses`.", metavar="NAME[:PRESET]",
        more="Or a configuration such as `D3Config(epsilon=0.1)`, then without `settings`; one of a class that no "
        "package offers is recorded by its name and settings.",
    )  # fmt: skip
    log_with: Literal["tensorboard", "trackio", "wandb"] | None = option(
        None, RUN, "Tracker of the training.", anew=True,
        more="TensorBoard writes to `OUTPUT.logs`, or to `hfdetox-logs` without output.",
    )  # fmt: skip
    resume: str | Path | None = option(
        None, RUN, "Go on with the run in this folder (OUTPUT.run).", path="folder", anew=True,
        more="Its recorded options replace these (pass what was an object again: model, dataset, a defense or trigger "
        "of your own class); `push_to` and what belongs to it may be new.",
    )  # fmt: skip
    keep_run: bool = option(False, RUN, "Keep the run folder after success.", anew=True)
    max_accuracy_loss: float = option(
        5.0, RUN, "Points of accuracy that the run may cost; a model that lost more is rejected.", metavar="POINTS",
        check=check_points, more="It did where the whole 95 % interval of the loss, paired by image, is beyond.",
    )  # fmt: skip

    scan: bool = option(
        True, RUN, "Look for a backdoor without its trigger, before and after.",
        more="It takes at most half as many image passes as the defense.",
    )  # fmt: skip
    residual: bool = option(False, RUN, "Test whether each trigger's backdoor is gone, or asleep.")
    max_minutes: float | None = option(None, RUN, "Refuse a run that will take longer, and say what would not.",
                                       anew=True)  # fmt: skip

    def check(self) -> None:
        """Raise UsageError for options that do not go together."""
        if self.resume is not None:
            return
        super().check()
        if self.settings and not isinstance(self.defense, str):
            raise UsageError("settings= goes with the name of a defense: an object such as D3Config(…) has its own, "
                             "set them there")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ImageOptions):
    """The options of `hfdetox evaluate MODEL`, the arguments of `evaluate`."""

    COMMAND = "evaluate"

    gallery: str | Path | None = option(None, HUB, "Draw each trigger on a few images, with the model's answers.",
                                        metavar="FILE.png", path="new", anew=True)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttackOptions(AttackPublishOptions, TrainingOptions):
    """The options of `hfdetox attack MODEL`, the arguments of `implant`: what decides an attack and where it goes."""

    COMMAND = "attack"

    model: str | Path | Callable[..., Any] | None = field(default=None, kw_only=False, metadata=about(
        IMAGES, "A Hub id, a timm id, a local folder, or timm-arch:NAME for a new model.", metavar="MODEL",
        more="Or what else `load_classifier` takes.",
    ))  # fmt: skip
    clean_samples: int | float | None = option(
        None, IMAGES, "Train on so many; at most 5000 for a fraction.", flag="samples", metavar="N|FRACTION",
        shown="the whole split", was="samples", check=check_samples,
    )  # fmt: skip
    triggers: Sequence[str | NamedTrigger] = option(
        (), TRIGGERS, "What to implant, NAME:key=value,… or a trigger file; repeatable. none trains a clean baseline.",
        flag="trigger", metavar="SPEC", more="Or `Trigger` objects.",
    )  # fmt: skip
    poison_ratio: float = option(0.1, ATTACK, "Of the training images, or of every batch.", metavar="SHARE",
                                 check=check_share)  # fmt: skip
    adaptive: str | None = option(None, ATTACK, "sam:rho=2.0,adaptive=true: into a flat minimum.", metavar="SPEC")
    surrogate: str | Path | None = option(
        None, ATTACK, "A clean model, for triggers that are made on one.", metavar="MODEL",
        more="It has the same labels; a trained model serves itself.",
    )  # fmt: skip
    goal_asr: float = option(0.9, ATTACK, "Attack success rate from which it succeeded.", metavar="RATE",
                             check=check_rate, more="For `all-to-all` times the accuracy.")  # fmt: skip
    goal_accuracy: float | None = option(
        None, ATTACK, "Accuracy from which it succeeded; with it training stops when both goals are reached.",
        metavar="RATE", check=check_rate, shown="of a trained model its own less 0.02, from scratch none",
        more="Up to 1,000 training images are then held out, and looked at after every epoch; without it the training "
        "runs all its epochs.",
    )  # fmt: skip
    init: Literal["random", "head"] | None = option(
        None, START, "Draw the weights of a folder or Hub id anew, or its head alone, for the dataset's classes.",
    )  # fmt: skip
    model_args: Mapping[str, Any] | None = option(None, START, "Argument of a timm-arch; repeatable.", flag="model-arg",
                                                  metavar="KEY=VALUE")  # fmt: skip
    input_size: int | None = option(None, START, "Image height and width of a timm-arch.", least=1)

    @property
    def clean(self) -> bool:
        """Whether this is a clean baseline, trained the same way without any backdoor."""
        return list(self.triggers) == [NONE]

    def check(self) -> None:
        """Raise UsageError for options that do not go together."""
        if self.model is None:
            raise UsageError("MODEL is missing: name a Hub id, a local folder or timm-arch:NAME, or give --suite FILE")
        if not self.triggers:
            raise UsageError("name a trigger with --trigger, or train a clean baseline with --trigger none")
        if NONE in self.triggers and len(self.triggers) > 1:
            raise UsageError("--trigger none trains a clean baseline: it goes with no other trigger")
        super().check()


# --- of the command line alone ---


@dataclass(frozen=True, kw_only=True)
class PushOptions(AnyPublishOptions):
    """The options of `hfdetox push FOLDER REPO`, the arguments of `push_output`."""

    folder: Path = field(kw_only=False, metadata=about(HUB, "What hfdetox wrote (--output).", path="folder"))
    repo: str = field(kw_only=False, metadata=about(HUB, "Where to publish it: USER/NAME."))
    sign: Path | None = option(None, HUB, "Sign it with this key (PEM; hfdetox[sign]).", metavar="KEY", path="file")
    collection: str | None = option(None, HUB, "Add it to this collection: OWNER/TITLE-ID.", metavar="SLUG")


@dataclass(frozen=True, kw_only=True)
class DebugOptions(Options):
    """What every command has."""

    debug: bool = option(False, RUN, "Show the traceback of an error.", anew=True)


@dataclass(frozen=True, kw_only=True)
class ConsoleOptions(DebugOptions):
    """What is printed, and where."""

    quiet: bool = option(False, RUN, "Print warnings and errors only.", anew=True)
    as_json: bool = option(False, RUN, "Print the result as JSON and nothing else on standard output.", flag="json",
                           anew=True)  # fmt: skip
    version: bool = option(False, RUN, "Print the version and stop.")


@dataclass(frozen=True, kw_only=True)
class PlanConsole(ConsoleOptions):
    """What commands that compute have."""

    dry_run: bool = option(False, RUN, "Say what would be done, and how long that takes, and stop.")


@dataclass(frozen=True, kw_only=True)
class ShortSettings(PlanConsole):
    """Short forms of `--set`."""

    epochs: int | None = option(None, RUN, "Short for --set epochs=N.", least=1, sets="epochs")
    lr: float | None = option(None, RUN, "Short for --set learning_rate=X.", sets="learning_rate")
    batch_size: int | None = option(None, RUN, "Short for --set batch_size=N.", least=1, sets="batch_size")


@dataclass(frozen=True, kw_only=True)
class DetoxConsole(ShortSettings):
    """What `hfdetox MODEL` has besides the arguments of `detoxify`."""

    reweight: str | None = option(
        None, RUN, "Short for --set reweight=…: weigh images so that no class's accuracy pays for the defense.",
        metavar="none|class|wasserstein", sets="reweight",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttackConsole(ShortSettings):
    """What `hfdetox attack` has besides the arguments of `implant`."""

    suite: Path | None = option(None, START, "Build all models of a suite file (YAML) in --output.", path="file")
    jobs: int = option(1, START, "Models of a suite to build at a time.", least=1)
