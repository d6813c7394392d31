"""The command line: parses, calls, prints. What it calls is imported in the commands, for torch takes seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
import traceback
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hfdetox import config
from hfdetox.cli import console as console
from hfdetox.cli import findings, verdicts
from hfdetox.cli.console import attack_advice, output_of, resume_advice, written
from hfdetox.cli.options import (
    CommandLine,
    attack_options,
    bench_options,
    detox_options,
    run_folder,
    show_version,
    suite_options,
    takes_line,
)
from hfdetox.cli.output import Output, plans, say, standard_output
from hfdetox.config_bench import BenchOptions, SuiteOptions
from hfdetox.config_scan import ScanOptions
from hfdetox.config_verify import GateOptions, PageOptions, VerifyOptions
from hfdetox.errors import HfdetoxError, UsageError, one_line
from hfdetox.evaluation.verdict import describe_visibility
from hfdetox.logging import complain, is_main_process, mask_secrets
from hfdetox.reporting.environment import check_torchvision
from hfdetox.threads import free_threads, use_threads

if TYPE_CHECKING:
    from hfdetox.runs.result import AttackResult, DetoxResult

INTERRUPTED = 130
# whether the command itself said that it was interrupted: Typer makes the same status of it elsewhere
_said: list[bool] = []
# what an interrupted suite or bench says
ONLY_THE_REST = "what is finished stays: give the same command again to go on"
FIRST_WORDS = (*config.COMMANDS, "--help", "--version", "--install-completion", "--show-completion")


class ShortForm(typer.core.TyperGroup):
    """The commands, the first of which may be left out: on a command line and while a shell completes one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `detox` first; a shell that completes the first word is offered the commands."""
        return super().parse_args(ctx, args if ctx.resilient_parsing and not args else with_command(args))


app = typer.Typer(
    cls=ShortForm, pretty_exceptions_enable=False, rich_markup_mode="rich", no_args_is_help=False,
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
@takes_line(config.DetoxOptions, config.DetoxConsole)
def detox(line: CommandLine) -> None:
    """Clean MODEL: pull, measure, defend, measure again, write the card, and publish if asked."""
    shown, options = line.options(config.DetoxConsole), detox_options(line)
    # an earlier result in the output folder is none of this run's
    earlier = written(output_of(run_folder(options)))
    with running(shown, lambda: resume_advice(run_folder(options), earlier=earlier)) as out:
        from hfdetox.detox import detoxify
        from hfdetox.planning import plan
        from hfdetox.runs.folder import RunFolder

        if options.resume is not None:
            # what is wrong with the folder is said when it is opened, after its lock
            with contextlib.suppress(UsageError):
                use_threads(RunFolder(Path(options.resume)).recorded().threads)
        if plans(shown, out, plan, options):
            return
        result = detoxify(**replace(options, progress=shows_progress(shown)).changed())
        report = result.report
        lines = [*console.rejection(report), console.title(report.model, report.dataset), console.report_table(report),
                 *findings.evidence_lines(report.evidence)]  # fmt: skip
        out.show(report.to_dict(), [*lines, *ends(result, "report and plots")])
        if report.rejected:
            raise typer.Exit(1)


@app.command()
@takes_line(config.EvaluateOptions, config.PlanConsole)
def evaluate(line: CommandLine) -> None:
    """Measure MODEL as it is: accuracy, and what each known trigger does."""
    shown, options = line.options(config.PlanConsole), line.options(config.EvaluateOptions)
    options.check()
    with running(shown, lambda: "nothing was written") as out:
        from hfdetox.detox import evaluate as measure
        from hfdetox.planning import plan_evaluate

        if plans(shown, out, plan_evaluate, options):
            return
        measured = measure(**replace(options, progress=shows_progress(shown)).changed())
        notes = {name: describe_visibility(found) for name, found in measured.visibility.items()}
        lines: list[Any] = [console.measurement_table({str(options.model): measured}, notes)]
        if options.gallery is not None:
            lines.append(f"gallery: {options.gallery}")
        out.show(dataclasses.asdict(measured), lines)


@app.command()
@takes_line(ScanOptions, config.PlanConsole)
def scan(line: CommandLine) -> None:
    """Look for a backdoor in MODEL without its trigger; nothing is trained."""
    shown, options = line.options(config.PlanConsole), line.options(ScanOptions)
    options.check()
    with running(shown, lambda: "nothing was written") as out:
        from hfdetox.planning import plan_scan
        from hfdetox.scanning import scan as look

        if plans(shown, out, plan_scan, options):
            return
        found = look(**replace(options, progress=shows_progress(shown)).changed())
        lines: list[Any] = [console.title(found.model, found.dataset)] if found.dataset else []
        if found.measurement is not None:
            lines.append(console.measurement_table({"as it is": found.measurement}))
        out.show(dataclasses.asdict(found), [*lines, *findings.scan_lines(found)])


@app.command()
@takes_line(config.AttackOptions, config.AttackConsole)
def attack(line: CommandLine) -> None:
    """Train a backdoor into MODEL, for research on defenses: a model, its trigger file, a report and a card."""
    shown = line.options(config.AttackConsole)
    if shown.suite is not None:
        build_suite(shown, suite_options(line))
        return
    options = attack_options(line)
    output = Path(options.output or "")
    earlier = written(output)
    with running(shown, lambda: attack_advice(output, earlier)) as out:
        from hfdetox.implanting import implant
        from hfdetox.planning import plan_attack

        if plans(shown, out, plan_attack, options):
            return
        result = implant(**replace(options, progress=shows_progress(shown)).changed())
        report = result.report
        lines = [*console.attack_lines(report), console.attack_table(report)]
        out.show(report.to_dict(), [*lines, *ends(result, "report, triggers and gallery")])
        if not report.succeeded:
            raise typer.Exit(1)


def ends(result: DetoxResult | AttackResult, parts: str) -> list[str]:
    """Return the lines that say where a result lies."""
    pushed = result.report.output
    lines = [] if result.output is None else [f"model, card (README.md), {parts}: {result.output}{os.sep}"]
    if pushed.pushed_to is not None:
        lines.append(f"published: {console.at_revision(pushed.pushed_to, pushed.commit)}")
    return lines


def build_suite(shown: config.PlanConsole, options: SuiteOptions) -> None:
    """Build the models of a suite file; the exit status is 1 when one failed or did not succeed."""
    with running(shown, lambda: "nothing was written" if shown.dry_run else ONLY_THE_REST) as out:
        from hfdetox.bench.zoo import plan_suite, run_suite

        if plans(shown, out, plan_suite, options):
            return
        outcome = run_suite(**replace(options, progress=shows_progress(shown)).changed())
        out.show(outcome.document(), [outcome, outcome.summary()])
        raise typer.Exit(outcome.exit_status)


@app.command()
@takes_line(BenchOptions, config.PlanConsole)
def bench(line: CommandLine) -> None:
    """Compare defenses: run those of SUITE on its backdoored models, and write tables and pictures."""
    # what is wrong with these is said before the libraries are loaded
    shown, options = line.options(config.PlanConsole), bench_options(line)
    with running(shown, lambda: "nothing was written" if shown.dry_run else ONLY_THE_REST) as out:
        from hfdetox.bench.bench import plan_bench, run_bench

        if plans(shown, out, plan_bench, options):
            return
        outcome = run_bench(**replace(options, progress=shows_progress(shown)).changed())
        folder = f"{outcome.folder}{os.sep}"
        pushed = [f"published: {outcome.pushed.url} (commit {outcome.pushed.commit})"] if outcome.pushed else []
        out.show(outcome.document(), [outcome, outcome.summary(), f"tables, settings, pictures: {folder}", *pushed])
        if shown.quiet and (problems := outcome.problems()) is not None:
            complain(problems)
        raise typer.Exit(outcome.exit_status)


@app.command()
@takes_line(config.PushOptions, config.DebugOptions)
def push(line: CommandLine) -> None:
    """Publish a folder that hfdetox wrote, for instance after a push that failed."""
    options = line.options(config.PushOptions)
    with running(config.ConsoleOptions(), lambda: "the folder is whole: give the same command again"):
        from hfdetox.hub.collections import add_to_collection, check_collection
        from hfdetox.runs.publish import push_output

        slug = check_collection(options.collection) if options.collection is not None else None
        pushed = push_output(options.folder, options.repo, sign=options.sign, **options.publishing())
        say(f"published: {pushed.pull_request or pushed.url} (commit {pushed.commit})")
        if slug is not None:
            say(f"in the collection: {add_to_collection(slug, pushed.repo_id)}")


@app.command()
@takes_line(VerifyOptions, config.PlanConsole)
def verify(line: CommandLine) -> None:
    """Check what hfdetox wrote, REPO or FOLDER: every hash, the card, and every rate by counting it again."""
    shown, options = line.options(config.PlanConsole), line.options(VerifyOptions)
    options.check()
    with running(shown, lambda: "nothing was written") as out:
        from hfdetox.planning import plan_verify
        from hfdetox.verifying import verify as check

        if plans(shown, out, plan_verify, options):
            return
        found = check(**replace(options, progress=shows_progress(shown)).changed())
        out.show(found.to_dict(), verdicts.verification_lines(found))
        raise typer.Exit(found.status)


@app.command()
@takes_line(PageOptions, config.DebugOptions)
def report(line: CommandLine) -> None:
    """Write the report of REPO or FOLDER as one HTML file, which asks for nothing when it is opened."""
    options = line.options(PageOptions)
    path = options.path()
    with running(config.ConsoleOptions(), lambda: "nothing was written"):
        from hfdetox.runs.page import write_page

        write_page(options.source, path, revision=options.revision)
        say(f"report: {path}")
        if options.open_it and not webbrowser.open(path.absolute().as_uri()):
            complain(f"no browser could be started: open {path} yourself")


@app.command()
@takes_line(GateOptions, config.PlanConsole)
def gate(line: CommandLine) -> None:
    """Decide whether MODEL may be used: pass, pass after cleaning, reject or unknown, with reasons."""
    shown, options = line.options(config.PlanConsole), line.options(GateOptions)
    options.check()
    with running(shown, lambda: "nothing was decided, which is no pass") as out:
        from hfdetox.gating import gate as decide
        from hfdetox.planning import plan_gate

        if plans(shown, out, plan_gate, options):
            return
        found = decide(**replace(options, progress=shows_progress(shown)).changed())
        out.show(found.to_dict(), verdicts.gate_lines(found))
        raise typer.Exit(found.status)


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
    shown = config.ConsoleOptions()
    with running(shown, lambda: f"run hfdetox demo again; {output} may hold the parts that were done"):
        # it reads this when it is imported; a bar for 1,800 digits says nothing
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        from hfdetox.demo import run as run_demo

        reports = run_demo(seed, output, say=say, compare=compare, progress=shows_progress(shown))
        for method, report in reports.items():
            say(*([f"with --defense {method}:"] if compare else []), *console.rejection(report),
                console.report_table(report), *findings.evidence_lines(report.evidence))  # fmt: skip
        say(f"model, card (README.md), report and plots: {output / 'cleaned'}{os.sep}")
        if reports[config.DEFAULT_DEFENSE].rejected:
            raise typer.Exit(1)


@app.command(name="list")
def list_entries(
    what: Annotated[Literal["attacks", "defenses", "scores", "triggers"], typer.Argument(help="Which family to list.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """List the attacks, the defenses (with presets and settings), the scores of a scan or the trigger families."""
    with running(config.ConsoleOptions(), lambda: "nothing was written"):
        room = importlib.import_module("hfdetox.evidence.base" if what == "scores" else f"hfdetox.{what}")
        if what == "defenses":
            say(f"without --defense: {config.DEFAULT_DEFENSE}; a name without a preset is its first")
        for name, entry in getattr(room, what.upper()).entries().items():
            say(*console.entry_lines(name, entry))
        if what == "attacks":
            say("all of them: how the model is trained")
            say(console.settings_table(dataclasses.asdict(room.TrainingSettings())))


@contextlib.contextmanager
def running(options: config.ConsoleOptions, advice: Callable[[], str]) -> Iterator[Output]:
    """Run a command that needs the libraries; Ctrl-C becomes one line with the `advice`, and exit status 130."""
    try:
        with standard_output(options) as out:
            prepare_console(options)
            # before the libraries are imported, which keeps a core busy
            free = free_threads()
            check_torchvision()
            use_threads(free)
            yield out
    except KeyboardInterrupt:
        _said.append(True)
        complain(f"interrupted; {advice()}")
        raise typer.Exit(INTERRUPTED) from None


def prepare_console(options: config.ConsoleOptions) -> None:
    """Turn the client libraries' bars and notices down, before they are imported."""
    # the libraries read these once, when they are imported; a thread that spins while it waits holds up the others
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not shows_progress(options):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def shows_progress(options: config.ConsoleOptions) -> bool:
    """Return whether this process draws progress bars (on standard error)."""
    return is_main_process() and not options.quiet


def with_command(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `detox` put first, unless they begin with a command, --help or --version."""
    return list(arguments) if arguments and arguments[0] in FIRST_WORDS else ["detox", *arguments]


# what Typer's own errors have in common: TyperException, and before Typer 0.28 click's ClickException
COMMAND_ERROR: Any = typer.BadParameter.__mro__[-4]  # above it: Exception, BaseException, object


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status (0, 1, 2, 3 or 130, see design); errors are one line."""
    _said.clear()
    try:
        for argument in arguments:
            _, given, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
            if not value.strip() and (given or not argument.strip()):
                raise UsageError(f"{argument or 'an argument'} is empty (a variable of the shell that is not set?): "
                                 "give it a value, or leave it out")  # fmt: skip
        command = typer.main.get_command(app)
        status = command.main(args=list(arguments), prog_name="hfdetox", standalone_mode=False)
    except COMMAND_ERROR as error:
        complain(f"error: {one_line(error.format_message().replace('Value error, ', ''), 280)}")
        return error.exit_code
    except HfdetoxError as error:
        if "--debug" in arguments:
            sys.stderr.write(mask_secrets(traceback.format_exc()))
        complain(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status == INTERRUPTED and not _said:
        complain("interrupted; nothing was written")
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
