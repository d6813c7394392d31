"""Where a dataset comes from: the Hub at one commit, a folder, or a `datasets` object, each opened as splits."""

import contextlib
import re
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import datasets
import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
)  # fmt: skip
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder as ImageFolderBuilder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hfdetox.config import ImageOptions
from hfdetox.data.columns import ColumnError, Columns, find_columns
from hfdetox.data.files import DamagedFileError, DatasetError, HubFiles, LocalFiles
from hfdetox.data.folders import ImageFolder, arrange
from hfdetox.data.labels import list_names
from hfdetox.data.metadata import METADATA_NAMES, check_files, owners_of
from hfdetox.data.readers import FolderReader, ParquetReader, SplitReader, StreamReader, TableReader, check_column
from hfdetox.data.webdataset import ROWS, TarRows, dotted
from hfdetox.documents import card_header, read_json
from hfdetox.errors import HubError, located, one_line, refusing
from hfdetox.hub.client import ask, transport_error
from hfdetox.hub.download import resolve, snapshot_folder

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_LOOK = 100  # rows that are looked at to tell which column holds the labels
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[\w.]+)")


@dataclass(kw_only=True)
class OpenedDataset:
    """An opened dataset: what it is called, what it is read from, and one `SplitReader` per split.

    Attributes:
        data: what `datasets` reads a folder or Hub repository by, an image folder, or tables by their split.
        files: the data files that it may name.
        named_by_card: whether the model's own card chose it.
        listed: how many images lie in each split of an image folder whose metadata files say the labels.
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
    labels: Sequence[str] = ()
    named_by_card: bool = False
    listed: Mapping[str, int] = field(default_factory=dict)

    def undescribed(self, reader: SplitReader) -> int:
        """Return how many images of a split that was read its metadata files do not name: they are not used."""
        return max(0, self.listed.get(reader.split, 0) - (reader.rows or 0)) if not reader.limited else 0

    def columns(self, split: str) -> Columns:
        """Return the image and label columns of a split; raises ColumnError when they cannot be told."""
        if isinstance(self.data, ImageFolder) and not self.data.classes and self.label_column is None:
            raise ColumnError(f"no image of dataset {self.id} lies in a folder of its class: make one of each class's "
                              "name, or a metadata.csv with the columns file_name and label")  # fmt: skip
        try:
            return find_columns(self._features(split), image_column=self.image_column, label_column=self.label_column,
                                labels=self.labels, values=lambda column: self._values(split, column))  # fmt: skip
        except ColumnError as error:
            if not isinstance(self.data, WebDataset):
                raise
            if name := self._dotted(split):
                raise dotted(name, f"the tar files of dataset {self.id}") from error
            raise ColumnError(f"{error}. {ROWS}" if "several" not in str(error) else str(error)) from error

    def open(self, split: str) -> SplitReader:
        """Open one split: tables in place, parquet by row groups, everything else as a stream."""
        columns = self.columns(split)
        return self.files.guard(f"split {split} of dataset {self.id}", lambda: self._reader(split, columns))

    def _reader(self, split: str, columns: Columns) -> SplitReader:
        if isinstance(self.data, Mapping):
            return TableReader(self.data[split], columns, split, self.files)
        if isinstance(self.data, ImageFolder):
            return FolderReader(self.data.splits[split], columns, split, self.files)
        if isinstance(self.data, Parquet):
            return ParquetReader(split, self._names(split), self.files, columns)
        stream = self._stream(split)
        if isinstance(self.data, WebDataset):
            self.data._get_pipeline_from_tar.expect(stream.features, columns.image, columns.label)
        known = (self.data.info.splits or {}).get(split)
        rows = known.num_examples or None if known else None
        return StreamReader(stream, columns, split, self.files, rows)

    def _features(self, split: str) -> Features:
        """Return a split's features: a table's own, or from the card, the parquet schema, or the first rows."""
        if isinstance(self.data, Mapping):
            return self.data[split].features
        if isinstance(self.data, ImageFolder):
            label = {"label": ClassLabel(names=list(self.data.classes))} if self.data.classes else {}
            return Features({"image": Image(), **label})
        if self.data.info.features is not None:
            return self.data.info.features
        if isinstance(self.data, Parquet):
            return self.files.read(self._names(split)[0], lambda source: Features.from_arrow_schema(
                pq.read_schema(source)))  # fmt: skip
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

    def _dotted(self, split: str) -> str | None:
        """Return the name of a file in a split's first tar that has more dots than that of its ending."""

        def look(source: Any) -> str | None:
            with tarfile.open(fileobj=source, mode="r|*", bufsize=2**20) as archive:
                names = [PurePosixPath(member.name).name for member in islice(archive, 4)]
            return next((name for name in names if name.count(".") > 1), None)

        return self.files.read(self._names(split)[0], look)

    def _values(self, split: str, column: str) -> set[str]:
        """Return values of a column of text, those of the first rows."""
        if isinstance(self.data, Mapping):
            rows = self.data[split].with_format(None).select_columns([column])[:_LOOK][column]
        elif isinstance(self.data, Parquet):
            batches = self.files.read(self._names(split)[0], lambda source: list(islice(
                pq.ParquetFile(source).iter_batches(_LOOK, row_groups=[0], columns=[column]), 1)))  # fmt: skip
            for batch in batches:
                check_column(self._names(split)[0], batch.schema, column)
            rows = batches[0].column(0).to_pylist() if batches else []
        else:
            stream = self._stream(split).select_columns([column]).take(_LOOK)
            with self.files.streaming():
                rows = self.files.guard(f"split {split}", lambda: [row[column] for row in stream])
        return {str(value) for value in rows if value}

    def _stream(self, split: str) -> IterableDataset:
        with self.files.streaming():
            return self.files.guard(f"dataset {self.id}", lambda: self.data.as_streaming_dataset(split=split))

    def _names(self, split: str) -> list[str]:
        return list(self.data.config.data_files[split])


def open_dataset(
    dataset: str | Path | Dataset | DatasetDict | OpenedDataset, options: ImageOptions, labels: Sequence[str] = (), *,
    warn: Callable[[str], None], hub_only: bool = False,
) -> OpenedDataset:  # fmt: skip
    """Open a Hub id, a folder or a `datasets` object; the Hub is asked for the commit first, which is then pinned.

    `options` say the configuration, the revision and the columns; the model's `labels` help to tell the classes. With
    `hub_only` a name is a Hub id even where a folder of that name lies here. One that is open stays as it is.

    Raises DatasetError (UsageError) for what cannot be read as asked, HubError for what the Hub does not give.
    """
    config, revision = options.dataset_config, options.dataset_revision
    if isinstance(dataset, OpenedDataset):
        return dataset
    if isinstance(dataset, (Dataset, DatasetDict, IterableDataset, IterableDatasetDict)):
        origin = _from_object(dataset)
    elif not hub_only and (Path(dataset).exists() or str(dataset).startswith((".", "/", "~"))
                           or isinstance(dataset, Path)):  # fmt: skip
        origin = _from_folder(Path(dataset), config)
    else:
        origin = _from_hub(str(dataset), config, revision, warn)
    if revision is not None and origin.source != "hub":
        raise DatasetError(f"--dataset-revision {revision}: only a dataset on the Hub has revisions; leave it out")
    origin.image_column, origin.label_column, origin.labels = options.image_column, options.label_column, labels
    if isinstance(origin.data, DatasetBuilder):
        _look_at_files(origin, warn)
    return origin


def _look_at_files(origin: OpenedDataset, warn: Callable[[str], None]) -> None:
    """Compare the files that `datasets` uses with those that are there; those of an image folder are arranged here.

    Raises DatasetError for a file of two splits.
    """
    config, listing, what = origin.data.config, origin.files.listing(), f"dataset {origin.id}"
    used = {name: str(split) for split, names in config.data_files.items() for name in names}
    twice = [name for name, count in Counter(chain(*config.data_files.values())).items() if count > 1]
    with refusing(f"the card (README.md) of {what} cannot be read", "; mend or remove it", DatasetError):
        card = listing.get("README.md")
        header = card_header(Path(origin.files.path(card)).read_text("utf-8", "replace") if card else None)
    told = config.name != "default" or "configs" in header
    loose = isinstance(origin.data, ImageFolderBuilder) and not config.drop_labels and not any(
        name.lower().endswith(_ARCHIVES) for name in used)  # fmt: skip
    if twice and (told or not loose):
        where = [split for split, names in config.data_files.items() if twice[0] in names]
        raise DatasetError(f"{what}: {PurePosixPath(twice[0]).name} is in the splits {' and '.join(map(str, where))}; "
                           "say in the card which files each has, or rename them")  # fmt: skip
    if loose:
        _arrange(origin, listing, used if told else None, warn)
    elif not told:
        endings = {PurePosixPath(name).suffix for name in used}
        unused = [path for path, name in listing.items() if name not in used and PurePosixPath(path).suffix in endings]
        if unused:
            warn(f"{len(unused)} files of {what} are in no split and are not used: {list_names(unused, 3)}")


def _arrange(
    origin: OpenedDataset, listing: Mapping[str, str], used: Mapping[str, str] | None, warn: Callable[[str], None]
) -> None:
    """Take the splits and classes of an image folder from where its files lie, or the labels of its metadata files."""
    images = {path: name for path, name in listing.items()
              if PurePosixPath(path).suffix.lower() in ImageFolderBuilder.EXTENSIONS
              and (used is None or name in used)}  # fmt: skip
    assigned = None if used is None else {path: used[name] for path, name in images.items()}
    folder = arrange(images, origin.labels, assigned)
    named = {split: [(images[path], label) for path, label in found] for split, found in folder.splits.items()}
    if folder.left_out:
        warn(f"{len(folder.left_out)} images of dataset {origin.id} lie beside the folders of classes, and are left "
             f"out: {list_names(folder.left_out, 3)}")  # fmt: skip
    if folder.together:
        warn(f"the folders {list_names(folder.together, 3)} of dataset {origin.id} have the same classes in them, and "
             "are no splits by their names (train, test, …): their images are taken together")  # fmt: skip
    metadata = [path for path in listing if PurePosixPath(path).name in METADATA_NAMES]
    owners = owners_of(origin.id, folder, metadata, warn)
    described = {split: [name for name, _ in found] for split, found in named.items()}
    for path, split in owners.items():
        described[split].append(listing[path])
    origin.splits, origin.data.config.data_files = list(named), described
    if owners:
        try:
            with contextlib.suppress(DamagedFileError):
                origin.columns(origin.splits[0])
            check_files(origin.files, {path: listing[path] for path in owners}, listing)
            origin.columns(origin.splits[0])
        except ColumnError:
            pass
        else:
            origin.listed = {split: len(found) for split, found in named.items()}
            return
        warn(f"{next(iter(owners))} of dataset {origin.id} has no label column: the folders' names are the labels")
    origin.data = replace(folder, splits=named)


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
        wrong = " is a file; give the folder that holds it" if folder.exists() else ": no such folder"
        raise DatasetError(f"dataset {folder}{wrong}")
    name, files = folder.resolve().name, LocalFiles(folder)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        for file in chain(folder.glob("*.json"), folder.glob("*/*.json")):
            with located(f"dataset {folder}", DatasetError):
                read_json(file)
        newer = f"dataset {folder} cannot be read, it may be of a newer version of `datasets` or cut off"
        with refusing(newer, kind=DatasetError):
            tables = datasets.load_from_disk(str(folder))
        origin = replace(_from_object(tables), id=name, source="folder", files=files)
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
        builder._get_pipeline_from_tar = TarRows()
    splits = list(map(str, names))
    return OpenedDataset(config=builder.config.name, splits=splits, data=builder, files=files, **known)


def _builder(path: str, what: str, **options: Any) -> DatasetBuilder:
    """Return the builder of a folder or repository, with the errors that a person can act on as one line."""
    try:
        return datasets.load_dataset_builder(path, **options)
    except Exception as error:
        if (found := transport_error(error)) is not None:
            raise found from error
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        line, places = one_line(error), [f"{one.f_globals.get('__name__')}.{one.f_code.co_name}" for one in frames]
        if isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)):
            line = "has no data files that hfdetox reads (parquet, image folder, webdataset)"
        elif any("yaml" in place or "card" in place for place in places):
            line = f"its card (README.md) cannot be read: {line}"
        elif isinstance(error, ValueError) and "onfig" in line:
            line = f"{line}; choose with --config"
        elif "scripts are no longer supported" in line:
            line = "is a loading script, which hfdetox does not run; try --dataset-revision refs/convert/parquet"
        raise DatasetError(f"{what}: {line}") from error


def _check_shards(names: Iterable[str], what: str) -> None:
    """Raise HubError when a cached split lacks shards: choosing among the rest would be another, silent choice."""
    shards = Counter(match.group(1, 3, 4) for match in map(_SHARD.fullmatch, names) if match)
    for (stem, total, _), count in shards.items():
        if count != int(total):
            raise HubError(f"only {count} of the {int(total)} files {stem}-… of {what} are cached and HF_HUB_OFFLINE "
                           "is set; unset it, or download the dataset once while online")  # fmt: skip
