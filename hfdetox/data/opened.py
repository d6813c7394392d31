"""Where a dataset comes from: the Hub at one commit, a folder, or a `datasets` object, each opened as splits."""

import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, Literal

import datasets
import pyarrow.parquet as pq
from datasets import Dataset, DatasetBuilder, DatasetDict, Features, IterableDataset, IterableDatasetDict
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import HfFileSystem

from hfdetox.config import ImageOptions
from hfdetox.data.columns import Columns, find_columns
from hfdetox.data.readers import DatasetError, LocalFiles, ParquetReader, Result, SplitReader, StreamReader, TableReader
from hfdetox.errors import HubError, one_line
from hfdetox.hub.client import ask
from hfdetox.hub.download import fetch, resolve, snapshot_folder

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_LABEL_ENDINGS = ("cls", "cls2", "index", "inx", "id", "txt", "text", "transcript", "json", "jsn")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[\w.]+)")


@dataclass(kw_only=True)
class OpenedDataset:
    """An opened dataset: what it is called, what it is read from, and one `SplitReader` per split.

    Attributes:
        data: a folder or Hub repository that `datasets` knows how to read, or tables that a caller holds or saved.
        files: the data files that it may name.
    """

    id: str
    config: str | None
    revision: str | None = None
    source: Literal["hub", "folder", "object"]
    splits: list[str]
    data: Any
    files: LocalFiles
    image_column: str | None = None
    label_column: str | None = None

    def columns(self, split: str) -> Columns:
        """Return the image and label columns of a split; raises ColumnError when they cannot be told."""
        return find_columns(self._features(split), image_column=self.image_column, label_column=self.label_column)

    def open(self, split: str) -> SplitReader:
        """Open one split: tables in place, parquet by row groups, everything else as a stream."""
        columns = self.columns(split)
        if isinstance(self.data, Mapping):
            return TableReader(self.data[split], columns, split, self.files)
        if isinstance(self.data, Parquet):
            return ParquetReader(split, self._names(split), self.files, columns)
        known = (self.data.info.splits or {}).get(split)
        rows = known.num_examples or None if known else None
        return StreamReader(self._stream(split), columns, split, self.files, rows)

    def _features(self, split: str) -> Features:
        """Return a split's features: a table's own, or from the card, the parquet schema, or the first rows."""
        if isinstance(self.data, Mapping):
            return self.data[split].features
        if self.data.info.features is not None:
            return self.data.info.features
        if isinstance(self.data, Parquet):
            name = self._names(split)[0]
            return self.files.guard(name, lambda: self._parquet_features(name))
        archive = next((n for s in self.splits for n in self._names(s) if n.lower().endswith(_ARCHIVES)), None)
        if archive and isinstance(self.data, FolderBasedBuilder):
            # datasets 5.2 takes the archive's own folder for every image's class
            raise DatasetError(f"dataset {self.id} is an image folder in archives ({PurePosixPath(archive).name}), "
                               "whose classes cannot be read; unpack it, or save it as parquet")  # fmt: skip
        features = self._stream(split).features
        if features is None:
            raise DatasetError(f"dataset {self.id} does not say what its columns hold; give its card a dataset_info, "
                               "or save it as parquet with an Image column")  # fmt: skip
        return features

    def _parquet_features(self, name: str) -> Features:
        with self.files.open(name) as source:
            return Features.from_arrow_schema(pq.read_schema(source))

    def _stream(self, split: str) -> IterableDataset:
        return self.files.guard(f"dataset {self.id}", lambda: self.data.as_streaming_dataset(split=split))

    def _names(self, split: str) -> list[str]:
        return list(self.data.config.data_files[split])


class _PlainWebDataset(WebDataset):
    """A webdataset of which only texts, numbers and JSON are decoded: labels.

    `datasets` gives every member with a known ending to its decoder, `.pth` to torch's unpickler; here the rest stays
    bytes.
    """

    DECODERS: ClassVar = {ending: WebDataset.DECODERS[ending] for ending in _LABEL_ENDINGS}


class HubFiles(LocalFiles):
    """Data files of a dataset repository at one commit; names are `hf://datasets/ID@SHA/PATH`."""

    readers = 8

    def __init__(self, state: Any) -> None:
        self._state, self._prefix = state, f"hf://datasets/{state.id}@{state.sha}/"
        self._system, self._downloaded = HfFileSystem(), dict[str, str]()

    def open(self, name: str) -> IO[bytes]:
        """Open a file that is downloaded, or one whose reads are range requests of exactly the bytes asked for."""
        self._inside(name)
        if name in self._downloaded:
            return open(self._downloaded[name], "rb")
        return self._system.open(name, "rb", cache_type="none")

    def path(self, name: str) -> str:
        """Download a file into the Hub cache, its hash checked, and return where it lies there."""
        if name not in self._downloaded:
            self._downloaded[name] = str(fetch(self._state, self._inside(name)))
        return self._downloaded[name]

    def size(self, name: str) -> int:
        """Return the size in bytes that the Hub's listing gives."""
        return int(self._state.files[self._inside(name)].size)

    def guard(self, what: str, call: Callable[[], Result]) -> Result:
        """Return `call()`, repeated where that may help; raises HubError."""
        return ask(lambda: super(HubFiles, self).guard(what, call), f"dataset {self._state.id}")

    def _inside(self, name: str) -> str:
        path = name.removeprefix(self._prefix)
        if path == name or path not in self._state.files:
            raise DatasetError(f"dataset {self._state.id} leads to {name[:200]}, outside its repository at this "
                               "commit; choose another")  # fmt: skip
        return path


def open_dataset(
    dataset: str | Path | Dataset | DatasetDict, options: ImageOptions, *, warn: Callable[[str], None],
    hub_only: bool = False,
) -> OpenedDataset:  # fmt: skip
    """Open a Hub id, a folder or a `datasets` object; the Hub is asked for the commit first, which is then pinned.

    `options` say the configuration, the revision and the columns. With `hub_only` a name is a Hub id even where a
    folder of that name lies here.

    Raises DatasetError (UsageError) for what cannot be read as asked, HubError for what the Hub does not give.
    """
    config, revision = options.dataset_config, options.dataset_revision
    if isinstance(dataset, (Dataset, DatasetDict, IterableDataset, IterableDatasetDict)):
        origin = _from_object(dataset)
    elif not hub_only and (Path(dataset).exists() or str(dataset).startswith((".", "/", "~"))
                           or isinstance(dataset, Path)):  # fmt: skip
        origin = _from_folder(Path(dataset), config)
    else:
        origin = _from_hub(str(dataset), config, revision, warn)
    if revision is not None and origin.source != "hub":
        raise DatasetError(f"--dataset-revision {revision}: only a dataset on the Hub has revisions; leave it out")
    origin.image_column, origin.label_column = options.image_column, options.label_column
    return origin


def _from_object(dataset: Any) -> OpenedDataset:
    if isinstance(dataset, (IterableDataset, IterableDatasetDict)):
        raise DatasetError("a streaming dataset has no rows to choose from; load it without streaming, or give its id")
    tables = dataset if isinstance(dataset, DatasetDict) else {dataset.split or "train": dataset}
    tables = {str(name): table for name, table in tables.items()}
    info = next(iter(tables.values())).info if tables else None
    return OpenedDataset(
        id=getattr(info, "dataset_name", None) or "dataset", config=getattr(info, "config_name", None),
        source="object", splits=list(tables), data=tables, files=LocalFiles(Path("/")),
    )  # fmt: skip


def _from_folder(folder: Path, config: str | None) -> OpenedDataset:
    if not folder.is_dir():
        wrong = "is a file; give the folder that holds it" if folder.exists() else "is missing: no such folder"
        raise DatasetError(f"dataset {folder} {wrong}")
    name, files = folder.resolve().name, LocalFiles(folder)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        origin = replace(_from_object(datasets.load_from_disk(str(folder))), id=name, source="folder", files=files)
        for table in origin.data.values():
            for file in table.cache_files:
                files.path(file["filename"])
        return origin
    builder = _builder(str(folder.resolve()), f"dataset {folder}", name=config)
    return _with_builder(builder, files, id=name, source="folder")


def _from_hub(repo: str, config: str | None, revision: str | None, warn: Callable[[str], None]) -> OpenedDataset:
    state = resolve(repo, repo_type="dataset", revision=revision)
    for note in state.warnings:
        warn(note)
    what, known = f"dataset {state.id}", {"id": state.id, "revision": state.sha, "source": "hub"}
    if state.offline:
        snapshot = snapshot_folder(state.id, state.repo_type, state.sha)
        _check_shards(state.files, what)
        try:
            return _with_builder(_builder(str(snapshot), what, name=config), LocalFiles(snapshot), **known)
        except DatasetError as error:
            raise HubError(f"{error}; only part of it may be cached: unset HF_HUB_OFFLINE") from error

    def load() -> DatasetBuilder:
        with _hub_name(state.id) as name:
            return _builder(name, what, name=config, revision=state.sha)

    builder = ask(load, what)
    names = list(chain(*(builder.config.data_files or {}).values()))
    # when the Hub fails on the way, datasets falls back in silence to whatever version it has prepared before
    if not names or any(not name.startswith(f"hf://datasets/{state.id}@{state.sha}/") for name in names):
        raise HubError(f"{what} could not be read at commit {state.sha[:12]}; the Hub failed on the way, try again")
    return _with_builder(builder, HubFiles(state), **known)


@contextlib.contextmanager
def _hub_name(repo: str) -> Iterator[str]:
    """Give the name by which `datasets` takes the Hub's repository, not a folder of the same name that lies here."""
    if tuple(map(int, datasets.__version__.split(".")[:2])) >= (4, 8):
        yield f"hf://datasets/{repo}"
    else:  # older ones look into the working directory first
        with tempfile.TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere):
            yield repo


def _with_builder(builder: DatasetBuilder, files: LocalFiles, **known: Any) -> OpenedDataset:
    names = builder.config.data_files or {}
    if not names:
        raise DatasetError(f"dataset {known['id']} has no data files that hfdetox can read")
    if not isinstance(files, HubFiles):
        for path in chain(*names.values()):
            files.path(path)
    if isinstance(builder, FolderBasedBuilder):
        # of the Hub, datasets would decode (and so download) each image that a scan for labels passes
        builder.config.decode_num_threads = 0
    if isinstance(builder, WebDataset):
        builder._get_pipeline_from_tar = _PlainWebDataset._get_pipeline_from_tar
    splits = list(map(str, names))
    return OpenedDataset(config=builder.config.name, splits=splits, data=builder, files=files, **known)


def _builder(path: str, what: str, **options: Any) -> DatasetBuilder:
    """Return the builder of a folder or repository, with the errors that a person can act on as one line."""
    try:
        return datasets.load_dataset_builder(path, **options)
    except (ValueError, RuntimeError, OSError) as error:
        line = one_line(error)
        if isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)):
            line = "has no data files that hfdetox reads (parquet, image folder, webdataset)"
        elif isinstance(error, ValueError) and "onfig" in line:
            line = f"{line}; choose with --config"
        elif "scripts are no longer supported" in line:
            line = "is a loading script, which hfdetox does not run; try --dataset-revision refs/convert/parquet"
        else:
            raise
        raise DatasetError(f"{what}: {line}") from error


def _check_shards(names: Iterable[str], what: str) -> None:
    """Raise HubError when a cached split lacks shards: choosing among the rest would be another, silent choice."""
    shards = Counter(match.group(1, 3, 4) for match in map(_SHARD.fullmatch, names) if match)
    for (stem, total, _), count in shards.items():
        if count != int(total):
            raise HubError(f"only {count} of the {int(total)} files {stem}-… of {what} are cached and HF_HUB_OFFLINE "
                           "is set; unset it, or download the dataset once while online")  # fmt: skip
