"""Parquet files with a column of encoded images: binary, or a struct with `bytes` as Hugging Face writes it.

Files called `<split>-00000-of-00003.parquet`, perhaps with a hash after the second number, are the parts of a split, and
its rows are numbered through them. Files of other names number their own rows.
"""

import bisect
import contextlib
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.items import (
    Item,
    Value,
    attempt,
    base_name,
    byte_size,
    choose_split,
    damage_as,
    open_bytes,
    split_name,
)
from pipelines.preprocess.sources.kinds import other_kind
from pipelines.preprocess.sources.names import key_of
from pipelines.storage.locations import Location

PART = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<parts>\d{5})(-[0-9a-f]+)?\.parquet")
PREFERRED_COLUMNS = ("image", "img")


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files with one column of images. An item's size is the number of its file and its offset the row in it.

    title: what the data set is called without its split. files: names, bytes and rows. beside: the kinds of other files in
    the folder, and their numbers.
    """

    folder: Location
    title: str
    column: str
    split: str | None
    files: tuple[tuple[str, int, int], ...]
    beside: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        return split_name(self.title, self.split)

    def items(self) -> list[Item]:
        items: list[Item] = []
        for number, (name, _, rows) in enumerate(self.files):
            rows_before = len(items) if self.split is not None else 0
            prefix = key_of(self.split if self.split is not None else name.removesuffix(".parquet"))
            items += [Item(f"{prefix}/{rows_before + row:08d}", row, number) for row in range(rows)]
        return sorted(items)

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        for number, in_file in itertools.groupby(items, key=lambda item: item.size):
            with _open_parquet(self.folder / self.files[number][0]) as file:
                counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                starts = list(itertools.accumulate(counts, initial=0))
                for group, in_group in itertools.groupby(
                    in_file, key=lambda item: bisect.bisect(starts, item.offset) - 1
                ):
                    yield from self._read_group(file, group, starts[group], list(in_group))

    def _read_group(
        self, file: pq.ParquetFile, group: int, start: int, items: Sequence[Item]
    ) -> Iterator[tuple[str, Value]]:
        """The values of items of one row group, whose first row is row `start` of the file."""
        is_struct = pa.types.is_struct(file.schema_arrow.field(self.column).type)
        leaf = f"{self.column}.bytes" if is_struct else self.column
        values: pa.ChunkedArray | None = None

        def read(row: int) -> bytes:
            nonlocal values
            if values is None:
                column = file.read_row_group(group, columns=[leaf]).column(self.column)
                values = pc.struct_field(column, "bytes") if is_struct else column
            return values[row].as_py() or b""

        broken: Exception | None = None  # of a whole group, so that it is read once
        for item in items:
            value = broken or attempt(functools.partial(read, item.offset - start))
            if isinstance(value, Exception) and values is None:
                broken = value
            yield item.key, value

    def others(self) -> dict[str, int]:
        return dict(self.beside)

    def kind_beside(self, name: str) -> str:
        """What a file that is none of the split's is counted as."""
        part = PART.fullmatch(name)
        return other_kind(name) if part is None or self.split is None else f"file of the split {part['split']!r}"

    def facts(self) -> dict[str, Any]:
        split = {} if self.split is None else {"split": self.split}
        return {
            "kind": "parquet",
            "column": self.column,
            **split,
            "files": {key_of(name): size for name, size, _ in self.files},
        }


@contextlib.contextmanager
def _open_parquet(path: Location) -> Iterator[pq.ParquetFile]:
    """Raises InputError if the footer is missing or damaged."""
    with open_bytes(path) as handle:
        with damage_as(
            lambda reason: InputError(f"source {str(path)!r} cannot be read as Parquet ({reason}): download it again")
        ):
            file = pq.ParquetFile(handle)
        yield file


def fitting_columns(schema: pa.Schema) -> list[str]:
    """The columns that may hold encoded images: binary of any layout, or a struct with such `bytes`."""
    fitting = []
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
            fitting.append(field.name)
    return fitting


def holds_images(folder: Location, names: Sequence[str]) -> bool:
    """Whether any of a folder's Parquet files has a column that may hold images."""
    for name in names:
        with _open_parquet(folder / name) as file:
            if fitting_columns(file.schema_arrow):
                return True
    return False


def image_column(schema: pa.Schema, path: Location) -> str:
    """The column of images: `image`, `img`, or the only one of a fitting type. Raises InputError if there is no such."""
    fitting = fitting_columns(schema)
    named = [name for name in PREFERRED_COLUMNS if name in fitting] or fitting
    if not named:
        raise InputError(
            f"source {str(path)!r} has the columns {', '.join(schema.names)}, none of which holds encoded images: "
            "give one with a column that is binary, or a struct with 'bytes'"
        )
    if len(fitting) > 1 and named is fitting:
        raise InputError(
            f"source {str(path)!r} has several columns that may hold images ({', '.join(fitting)}): "
            "call the right one 'image', or drop the others"
        )
    return named[0]


def parts_by_split(names: Sequence[str], folder: Location) -> dict[str, list[str]]:
    """Each split's files in order; empty if some name is not that of a part. Raises InputError if a part is missing."""
    splits: dict[str, list[re.Match[str]]] = {}
    for name in sorted(names):
        match = PART.fullmatch(name)
        if match is None:
            return {}
        splits.setdefault(match["split"], []).append(match)
    for split, parts in splits.items():
        if [int(part["number"]) for part in parts] != list(range(int(parts[0]["parts"]))):
            raise InputError(
                f"source {str(folder)!r} has {len(parts)} files of the split {split!r}, not the numbers 0 to "
                f"{int(parts[0]['parts']) - 1} that their names speak of: download the split anew, or give one of its files"
            )
    return {split: [part.string for part in parts] for split, parts in splits.items()}


def open_file(path: Location, split: str | None) -> ParquetSource:
    """One file; a split if its name says that it is the whole of one."""
    name = base_name(path)
    match = PART.fullmatch(name)
    splits = {match["split"]: [name]} if match is not None and int(match["parts"]) == 1 else {}
    title = key_of(base_name(path.parent) if splits else name.removesuffix(".parquet"))
    return _open(path.parent, [name], splits, split, title, path)


def open_folder(folder: Location, names: Sequence[str], split: str | None) -> ParquetSource:
    """A folder's Parquet files; without a split, train."""
    return _open(folder, names, parts_by_split(names, folder), split, key_of(base_name(folder)), folder)


def _open(
    folder: Location, names: Sequence[str], splits: dict[str, list[str]], split: str | None, title: str, path: Location
) -> ParquetSource:
    """The source of some of a folder's files. Their footers are read, which a cut file lacks. path: what errors name."""
    chosen = choose_split(split, tuple(splits), path)
    files, columns = [], set()
    for name in sorted(names) if chosen is None else splits[chosen]:
        with _open_parquet(folder / name) as file:
            columns.add(image_column(file.schema_arrow, folder / name))
            files.append((name, byte_size(folder / name), int(file.metadata.num_rows)))
    if len(columns) > 1:
        raise InputError(
            f"source {str(path)!r} has Parquet files with different columns of images ({', '.join(sorted(columns))}): "
            "give one of the files, or a folder for each kind"
        )
    return ParquetSource(folder, title, columns.pop(), chosen, tuple(files))
