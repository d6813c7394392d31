"""The options of the commands that judge what there is, and train nothing unless asked; declared as in `config.py`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hfdetox.arguments import Options, about, option
from hfdetox.checks import check_replaced, check_samples, check_there, same_path
from hfdetox.config import DEFAULT_SAMPLES, HUB, IMAGES, RUN, Device, ImageOptions
from hfdetox.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """The options of `hfdetox verify`, the arguments of `hfdetox.verify`."""

    source: str | Path | None = field(default=None, kw_only=False, metadata=about(
        HUB, "What hfdetox wrote: a Hub id or a folder.", metavar="REPO|FOLDER"))  # fmt: skip
    dataset: str | Path | None = option(None, IMAGES, "The images, where the report names a local folder.",
                                        metavar="DIR")  # fmt: skip
    base: str | Path | None = option(None, IMAGES, "The model as it came, where the report names a local folder.",
                                     metavar="DIR")  # fmt: skip
    device: Device = option("auto", RUN, "Where to run.")
    revision: str | None = option(None, HUB, "The repository's commit or branch.")
    public_key: str | Path | None = option(None, HUB, "Check the signature with this key (PEM).", path="file")
    trust_remote_code: bool = option(False, HUB, "Run the Python code that the model's repository brings.")
    progress: bool = option(True, None, "Whether bars are drawn.")

    def check(self) -> None:
        """Raise UsageError for options that do not go together."""
        if self.source is None:
            raise UsageError("REPO or FOLDER is missing: name what hfdetox wrote (see hfdetox verify --help)")
        for name in ("dataset", "base"):
            check_there(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class PageOptions(Options):
    """The options of `hfdetox report`, the arguments of `write_page`."""

    source: str = field(kw_only=False, metadata=about(HUB, "What hfdetox wrote: a Hub id or a folder.",
                                                      metavar="REPO|FOLDER"))  # fmt: skip
    html: Path | None = option(None, HUB, "The file.", metavar="FILE.html", path="new", shown="NAME.html")
    open_it: bool = option(False, HUB, "Open it in the browser.", flag="open")
    revision: str | None = option(None, HUB, "The repository's commit or branch.")

    def path(self) -> Path:
        """Return where the page goes, in place of an earlier one; UsageError for another file, or a name of none."""
        path = self.html or Path(f"{Path(self.source).resolve().name}.html")
        if path.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--html {path}: give it a name that ends in .html")
        check_replaced("--html", path, '<meta name="generator" content="hfdetox ')
        return path


@dataclass(frozen=True, kw_only=True)
class GateOptions(ImageOptions):
    """The options of `hfdetox gate`, the arguments of `hfdetox.gate`."""

    COMMAND = "gate"

    clean_samples: int | float = option(
        DEFAULT_SAMPLES, IMAGES, "Clean images to look at: a fraction with a point, or a count.", flag="samples",
        metavar="N|FRACTION", check=check_samples, more="A fraction gives at most 5000.",
    )  # fmt: skip
    policy: str | Path | None = option(None, RUN, "What has to hold, a YAML file over the default policy.",
                                       path="file")  # fmt: skip
    clean: bool = option(False, RUN, "Clean a model in which a class is suspected, into --output.")
    output: str | Path | None = option(None, HUB, "Folder of the cleaned model.", path="new")
    public_key: str | Path | None = option(None, HUB, "Check the signature of a cleaned model with this key (PEM).",
                                           path="file")  # fmt: skip
    sarif: str | Path | None = option(None, HUB, "Write the findings as SARIF 2.1.0.", metavar="FILE", path="new")
    cyclonedx: str | Path | None = option(None, HUB, "Write a bill of materials, CycloneDX 1.7.", metavar="FILE",
                                          path="new")  # fmt: skip

    def check(self) -> None:
        """Raise UsageError for options that do not go together."""
        super().check()
        if self.clean != (self.output is not None):
            raise UsageError("--clean and --output go together: clean it, and where to")
        if self.triggers and not self.clean:
            raise UsageError("--trigger goes with --clean, to be measured before and after; hfdetox evaluate measures "
                             "known triggers of a model as it is")  # fmt: skip
        # by what stands in no other program's files: a bill of materials may name hfdetox among many
        for name, mark in (("sarif", '"id": "suspicious-class"'), ("cyclonedx", '"name": "hfdetox:gate:verdict"')):
            file = getattr(self, name)
            if file is not None:
                check_replaced(f"--{name}", Path(file), mark)
        if self.sarif is not None and self.cyclonedx is not None and same_path(self.sarif, self.cyclonedx):
            raise UsageError(f"--sarif and --cyclonedx both name {self.sarif}: give each a file of its own")

    def images(self) -> dict[str, Any]:
        """Return the options that choose model and images, as arguments of other commands."""
        own = {one.name for one in fields(GateOptions)} - {one.name for one in fields(ImageOptions)}
        return {name: value for name, value in self.changed().items() if name not in own - {"clean_samples"}}

    def cleaning(self) -> dict[str, Any]:
        """Return the options as arguments of `detoxify`."""
        return self.images() | {"output": self.output}
