"""The command line: parses, calls, prints. What it calls is imported in the commands, for torch takes seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from hfdetox.cli import console as console
from hfdetox.cli.attack_options import AttackOptions
from hfdetox.cli.bench_options import BenchOptions
from hfdetox.config import (
    COMMANDS,
    DEFAULT_DEFENSE,
    ConsoleOptions,
    DetoxOptions,
    EvaluateOptions,
    given_options,
    planned_arguments,
    show_version,
    takes,
)
from hfdetox.errors import HfdetoxError, UsageError
from hfdetox.evaluation.verdict import describe_visibility
from hfdetox.files import REPORT_NAMES
from hfdetox.reporting.environment import check_torchvision, is_main_process, mask_secrets

INTERRUPTED = 130
FIRST_WORDS = (*COMMANDS, "--help", "--version")

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich", no_args_is_help=False,
    help="Pull an image classifier, fine-tune a backdoor away on a few clean images, measure, publish it with a card."
    "\n\n"
    "[bold]hfdetox MODEL[/bold] is short for [bold]hfdetox detox MODEL[/bold]; "
    "its options: [bold]hfdetox detox --help[/bold].",
)  # fmt: skip


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    pass


@app.command()
@takes(DetoxOptions)
def detox(context: typer.Context, options: DetoxOptions) -> None:
    """Clean MODEL: pull, measure, defend, measure again, write the card, and publish if asked."""
    arguments = options.arguments(given_options(context))
    # an earlier result in the output folder is none of this run's
    earlier = written(_output_of(options.run_folder()))
    with (
        interruptible(lambda: resume_advice(options.run_folder(), earlier=earlier)),
        standard_output(options) as out,
    ):
        prepare_console(options)
        check_torchvision()
        from hfdetox.detox import detoxify, plan

        if options.dry_run and options.model is not None:  # a dry run without MODEL has been refused
            planned = plan(options.model, **planned_arguments(arguments))
            out.show(planned, console.plan_lines(planned))
            return
        result = detoxify(options.model, **arguments, progress=shows_progress(options))
        report = result.report
        lines: list[Any] = [console.title(report.model, report.dataset), console.report_table(report)]
        if result.output is not None:
            lines.append(f"model, card (README.md), report and plots: {result.output}{os.sep}")
        if report.output.pushed_to is not None:
            lines.append(f"published: {console.at_revision(report.output.pushed_to, report.output.commit)}")
        out.show(report.to_dict(), lines)


@app.command()
@takes(EvaluateOptions)
def evaluate(context: typer.Context, options: EvaluateOptions) -> None:
    """Measure MODEL as it is: accuracy, and what each known trigger does."""
    if options.model is None:
        raise UsageError("MODEL is missing: name a Hub id or a local folder (see hfdetox evaluate --help)")
    with interruptible(lambda: "nothing was written"), standard_output(options) as out:
        prepare_console(options)
        check_torchvision()
        from hfdetox.detox import evaluate as measure

        measured = measure(
            options.model, **options.data_arguments(), gallery=options.gallery, progress=shows_progress(options)
        )
        notes = {name: describe_visibility(found) for name, found in measured.visibility.items()}
        lines: list[Any] = [console.measurement_table({options.model: measured}, notes)]
        if options.gallery is not None:
            lines.append(f"gallery: {options.gallery}")
        out.show(dataclasses.asdict(measured), lines)


@app.command()
@takes(AttackOptions)
def attack(context: typer.Context, options: AttackOptions) -> None:
    """Train a backdoor into MODEL, for research on defenses: a model, its trigger file, a report and a card."""
    if options.suite is not None:
        build_suite(options, options.suite, options.suite_arguments(given_options(context)))
        return
    arguments = options.arguments()
    earlier = written(options.place())
    with interruptible(lambda: attack_advice(options.place(), earlier)), standard_output(options) as out:
        prepare_console(options)
        check_torchvision()
        from hfdetox.implanting import implant

        result = implant(options.model or "", **arguments, progress=shows_progress(options))
        report = result.report
        lines: list[Any] = [*console.attack_lines(report), console.attack_table(report)]
        if result.output is not None:
            lines.append(f"model, card (README.md), report, triggers and gallery: {result.output}{os.sep}")
        if report.output.pushed_to is not None:
            lines.append(f"published: {console.at_revision(report.output.pushed_to, report.output.commit)}")
        out.show(report.to_dict(), lines)
        if not report.succeeded:
            raise typer.Exit(1)


def build_suite(options: AttackOptions, file: Path, arguments: dict[str, Any]) -> None:
    """Build the models of a suite file; the exit status is 1 when one failed or did not succeed."""
    with (
        interruptible(lambda: "what is finished stays: give the same command again to go on"),
        standard_output(options) as out,
    ):
        prepare_console(options)
        check_torchvision()
        from hfdetox.bench.zoo import run_suite

        outcome = run_suite(file, **arguments, progress=shows_progress(options))
        out.show(outcome.document(), [outcome.table(), outcome.summary()])
        raise typer.Exit(outcome.exit_status)


@app.command()
@takes(BenchOptions)
def bench(context: typer.Context, options: BenchOptions) -> None:
    """Compare defenses: run those of SUITE on its backdoored models, and write tables and pictures."""
    with (
        interruptible(lambda: "what is finished stays: give the same command again to go on"),
        standard_output(options) as out,
    ):
        prepare_console(options)
        arguments = options.arguments()
        check_torchvision()
        from hfdetox.bench.runner import run_bench

        outcome = run_bench(**arguments, progress=shows_progress(options))
        folder = f"{outcome.folder}{os.sep}"
        out.show(outcome.document(), [outcome.tables(), outcome.summary(), f"tables, settings, pictures: {folder}"])
        if options.quiet and (problems := outcome.problems()) is not None:
            complain(problems)
        raise typer.Exit(outcome.exit_status)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What hfdetox wrote (--output).")],
    repo: Annotated[str, typer.Argument(help="Where to publish it: USER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request on the existing one.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also if hfdetox did not make the repository.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Publish a backdoored model publicly.")] = False,
    i_know_this_is_backdoored: Annotated[
        bool, typer.Option("--i-know-this-is-backdoored", help="Needed to publish a backdoored model.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Publish a folder that hfdetox wrote, for instance after a push that failed."""
    with interruptible(lambda: "the folder is whole: give the same command again"):
        from hfdetox.runs.publish import push_output

        prepare_console(ConsoleOptions())
        pushed = push_output(folder, repo, private=private, create_pr=create_pr, overwrite=overwrite, public=public,
                             i_know_this_is_backdoored=i_know_this_is_backdoored)  # fmt: skip
        say(f"published: {pushed.pull_request or pushed.url} (commit {pushed.commit})")


@app.command()
def demo(
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the whole demo.")] = 0,
    output: Annotated[Path, typer.Option("--output", help="Folder of the results.")] = Path("demo-output"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also clean by d3:paper and by fine-tuning alone.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Backdoor a small classifier of handwritten digits and clean it, without any network, in a few minutes."""
    with interruptible(lambda: f"run hfdetox demo again; {output} may hold the parts that were done"):
        prepare_console(ConsoleOptions())
        # it reads this when it is imported; a bar for 1,800 digits says nothing
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        check_torchvision()
        from hfdetox.demo import run as run_demo

        reports = run_demo(seed, output, say=say, compare=compare, progress=shows_progress(ConsoleOptions()))
        for method, report in reports.items():
            say(*([f"with --defense {method}:"] if compare else []), console.report_table(report))
        say(f"model, card (README.md), report and plots: {output / 'cleaned'}{os.sep}")


@app.command(name="list")
def list_entries(
    what: Annotated[Literal["attacks", "defenses", "triggers"], typer.Argument(help="Which family to list.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """List the attacks, the defenses (with presets and settings) or the trigger families."""
    with interruptible(lambda: "nothing was written"):
        check_torchvision()
        prepare_console(ConsoleOptions())
        if what == "triggers":
            from hfdetox.triggers import TRIGGERS

            for name, trigger in TRIGGERS.entries().items():
                say(console.entry_line(name, trigger, trigger.member.paper), console.trigger_table(trigger))
            return
        if what == "attacks":
            list_attacks()
            return
        from hfdetox.defenses import DEFENSES

        say(f"without --defense: {DEFAULT_DEFENSE}; a name without a preset is its first")
        for name, entry in DEFENSES.entries().items():
            config = entry.member
            presets = "; ".join(console.preset_line(name, *preset) for preset in config.presets.items())
            needs = f"needs {config.data}; cost, relative to plain fine-tuning: {config.cost}"
            say(console.entry_line(name, entry, config.paper), needs, presets, console.defense_table(entry))


def list_attacks() -> None:
    """Print the attacks with their own settings, and the settings that all of them share."""
    from hfdetox.attacks import ATTACKS, TrainingSettings

    for name, entry in ATTACKS.entries().items():
        say(console.entry_line(name, entry, entry.member.how))
        if entry.parameters:
            say(console.settings_table(entry.parameters))
    say("all of them: how the model is trained", console.settings_table(dataclasses.asdict(TrainingSettings())))


class Output:
    """Standard output of a command: a JSON document, or lines and tables, or nothing."""

    def __init__(self, options: ConsoleOptions, stream: Any) -> None:
        self.options, self.stream = options, stream

    def show(self, document: dict[str, Any], lines: Sequence[Any]) -> None:
        """Write the document with `--json`, else the lines (text or rich tables) unless `--quiet`."""
        if not is_main_process():
            return
        if self.options.as_json:
            self.stream.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")
        elif not self.options.quiet:
            say(*lines)


@contextlib.contextmanager
def standard_output(options: ConsoleOptions) -> Iterator[Output]:
    """With `--json`, send what a library prints to standard error: only the document goes to standard output."""
    output = Output(options, sys.stdout)
    with contextlib.redirect_stdout(sys.stderr) if options.as_json else contextlib.nullcontext():
        yield output


@contextlib.contextmanager
def interruptible(advice: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to go on, and exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        complain(f"interrupted; {advice()}")
        raise typer.Exit(INTERRUPTED) from None


def written(output: Path | None) -> tuple[int, int] | None:
    """Return what tells the result in `output` from one written later, None where there is none."""
    for name in REPORT_NAMES if output is not None else ():
        with contextlib.suppress(OSError):
            found = (output / name).stat()  # type: ignore[operator]
            return found.st_ino, found.st_mtime_ns
    return None


def _output_of(run_folder: Path | None) -> Path | None:
    return run_folder and run_folder.with_name(run_folder.name.removesuffix(".run"))


def attack_advice(output: Path | None, earlier: tuple[int, int] | None) -> str:
    """Return whether anything of an interrupted attack was written; `earlier` is what `written` gave before it."""
    if output is not None and written(output) not in (None, earlier):
        return f"the result in {output} is whole; publish it with: {shlex.join(['hfdetox', 'push', str(output)])} REPO"
    return "nothing was written: give the same command again to start anew"


def resume_advice(run_folder: Path | None, *, earlier: tuple[int, int] | None = None) -> str:
    """Return how to go on with the run in `run_folder`, that only the push was left, or that it had not begun.

    Args:
        earlier: what `written` gave before the run.
    """
    if run_folder is not None and run_folder.is_dir():
        return f"resume with: {shlex.join(['hfdetox', '--resume', str(run_folder)])}"
    output = _output_of(run_folder)
    if output is not None and written(output) not in (None, earlier):
        return f"the result in {output} is whole; publish it with: {shlex.join(['hfdetox', 'push', str(output)])} REPO"
    return "the run had not begun, and nothing was written"


class OneLineHandler(logging.Handler):
    """Shows what the package warns of as one line each on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"{record.levelname.lower()}: {record.getMessage()}")


def prepare_console(options: ConsoleOptions) -> None:
    """Show hfdetox's warnings as lines, and turn the client libraries' bars and notices down."""
    logger = logging.getLogger("hfdetox")
    if not any(isinstance(handler, OneLineHandler) for handler in logger.handlers):
        logger.addHandler(OneLineHandler(logging.WARNING))
        logger.propagate = False
    # the clients read these once, when they are imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not shows_progress(options):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def shows_progress(options: ConsoleOptions) -> bool:
    """Return whether this process draws progress bars (on standard error)."""
    return is_main_process() and not options.quiet


def say(*lines: Any) -> None:
    """Print text and rich tables on standard output, from the main process only."""
    if is_main_process():
        console = Console(file=sys.stdout, highlight=False)
        for line in lines:
            console.print(line, markup=False, soft_wrap=isinstance(line, str))


def complain(line: str) -> None:
    """Print one line on standard error, without secrets.

    Every process does: one that fails alone, or first, would take its reason with it.
    """
    rank = "" if is_main_process() else f" (process {os.environ['RANK']})"
    sys.stderr.write(f"hfdetox{rank}: {mask_secrets(' '.join(line.split()))}\n")


def with_command(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `detox` put first, unless they begin with a command, --help or --version."""
    return list(arguments) if arguments and arguments[0] in FIRST_WORDS else ["detox", *arguments]


# what Typer's own errors have in common: TyperException, and before Typer 0.28 click's ClickException
COMMAND_ERROR: Any = typer.BadParameter.__mro__[-4]  # above it: Exception, BaseException, object


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status (0, 1, 2, 3 or 130, see design); errors are one line."""
    command = typer.main.get_command(app)
    try:
        status = command.main(args=with_command(arguments), prog_name="hfdetox", standalone_mode=False)
    except COMMAND_ERROR as error:
        complain(f"error: {error.format_message()}")
        return error.exit_code
    except HfdetoxError as error:
        if "--debug" in arguments:
            sys.stderr.write(mask_secrets(traceback.format_exc()))
        complain(f"error: {error}")
        return error.exit_status
    return status if isinstance(status, int) else 0


def main() -> None:
    """Run the command line of this process and exit with its status."""
    arguments = sys.argv[1:]
    if "--debug" not in arguments:
        sys.excepthook = one_line_hook
    sys.exit(run(arguments))


def one_line_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an exception that hfdetox did not foresee in one line; Python then exits with status 1."""
    complain(f"error: {kind.__name__}: {error} (not foreseen: run again with --debug, and report the traceback)")
