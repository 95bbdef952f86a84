"""The TFRecords of ProgressiveGAN and StyleGAN, such as celebahq-r08.tfrecords, read without TensorFlow.

    record:  length n (uint64) | checksum of the length (uint32) | data (n bytes) | checksum of the data (uint32)

All numbers are little-endian; the checksums are CRC-32C, rotated and shifted ("masked"). The data is a `tf.train.Example`,
a protocol buffer, with the features `shape` (channels, height, width) and `data` (uint8 in that order).
"""

import functools
import itertools
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.items import Item, Value, attempt, base_name, byte_size, open_bytes
from pipelines.preprocess.sources.names import key_of
from pipelines.storage.locations import Location

SUFFIX = ".tfrecords"
RESOLUTION = re.compile(r"-r\d\d$")  # celebahq-r08 is 2**8 pixels wide
HEADER = struct.Struct("<QI")  # length, its checksum
CHECKSUM = struct.Struct("<I")


def _field(name: str, number: int, kind: str, label: str = "LABEL_OPTIONAL") -> str:
    """A field of a message in the text form of a descriptor; `kind` is a TYPE_ or the name of a message."""
    type_of_field = f"type: {kind}" if kind.startswith("TYPE_") else f"type: TYPE_MESSAGE type_name: '{kind}'"
    return f"field {{ name: '{name}' number: {number} label: {label} {type_of_field} }}"


# The part of tensorflow/core/example that is used here, with its field numbers. A map is a list of key and value.
_SCHEMA = f"""
name: 'example.proto' syntax: 'proto3'
message_type {{ name: 'BytesList' {_field("value", 1, "TYPE_BYTES", "LABEL_REPEATED")} }}
message_type {{ name: 'Int64List' {_field("value", 1, "TYPE_INT64", "LABEL_REPEATED")} }}
message_type {{ name: 'Feature' {_field("bytes_list", 1, ".BytesList")} {_field("int64_list", 3, ".Int64List")} }}
message_type {{ name: 'Entry' {_field("key", 1, "TYPE_STRING")} {_field("value", 2, ".Feature")} }}
message_type {{ name: 'Features' {_field("feature", 1, ".Entry", "LABEL_REPEATED")} }}
message_type {{ name: 'Example' {_field("features", 1, ".Features")} }}
"""
_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
Example = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("Example"))


def masked_crc(data: bytes) -> int:
    """The CRC-32C of bytes as TFRecords store it: masked, so that data that holds CRCs is no special case."""
    crc = int(google_crc32c.value(data))
    # rotate right by 15 bits, add a constant, modulo 2^32
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def is_tfrecord(head: bytes) -> bool:
    """Whether a file's first bytes are a length and its checksum."""
    return len(head) >= HEADER.size and HEADER.unpack_from(head)[1] == masked_crc(head[:8])


def pixels(record: bytes) -> np.ndarray:
    """The image of one Example, uint8 [H,W,C]. Raises ValueError for an Example of another kind, DecodeError if it is none."""
    features = {entry.key: entry.value for entry in Example.FromString(record).features.feature}
    if not {"shape", "data"} <= features.keys():
        raise ValueError(f"the record has the features {sorted(features)}: 'shape' and 'data' are wanted")
    shape, data = list(features["shape"].int64_list.value), b"".join(features["data"].bytes_list.value)
    if len(shape) != 3 or min(shape) < 1 or shape[0] * shape[1] * shape[2] != len(data):
        raise ValueError(f"the record has the shape {shape} and {len(data)} bytes: [channels, height, width] is wanted")
    return np.frombuffer(data, np.uint8).reshape(shape).transpose(1, 2, 0)


@dataclass(frozen=True)
class TFRecordSource:
    """Files of records. An item carries the first byte of its record's data and their number; its key names the file.

    files: names and bytes. beside: the kinds of other files in the folder, and their numbers.
    """

    folder: Location
    files: tuple[tuple[str, int], ...]
    beside: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        only = self.files[0][0] if len(self.files) == 1 else base_name(self.folder)
        return key_of(RESOLUTION.sub("", only.removesuffix(SUFFIX)))

    def items(self) -> list[Item]:
        return sorted(item for name, size in self.files for item in self._records(name, size))

    def _records(self, name: str, size: int) -> Iterator[Item]:
        """The items of one file of `size` bytes, from the records' headers. Raises InputError if one is damaged."""
        with open_bytes(self.folder / name) as file:
            start = 0
            for number in itertools.count():
                file.seek(start)
                header = file.read(HEADER.size)
                if not header:
                    return
                length = int.from_bytes(header[:8], "little")
                end = start + HEADER.size + length + CHECKSUM.size
                if end > size or not is_tfrecord(header):
                    beyond = f"it ends beyond the file's {size:,} bytes"
                    reason = beyond if is_tfrecord(header) else "the checksum of its length is wrong"
                    raise InputError(
                        f"source {str(self.folder / name)!r} is damaged at record {number} ({reason}), and what follows cannot "
                        "be found: download or make it again"
                    )
                yield Item(f"{key_of(name.removesuffix(SUFFIX))}/{number:08d}", start + HEADER.size, length)
                start = end

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        for stem, group in itertools.groupby(items, key=lambda item: item.key.rsplit("/", 1)[0]):
            names = [name for name, _ in self.files if key_of(name.removesuffix(SUFFIX)) == stem]
            with open_bytes(self.folder / names[0]) as file:
                for item in group:
                    yield item.key, attempt(functools.partial(_read_record, file, item), item.size)

    def others(self) -> dict[str, int]:
        return dict(self.beside)

    def facts(self) -> dict[str, Any]:
        return {"kind": "tfrecords", "files": {key_of(name): size for name, size in self.files}}


def _read_record(file: BinaryIO, item: Item) -> np.ndarray:
    """The image of a record. Raises ValueError or DecodeError if it is damaged or of another kind."""
    file.seek(item.offset)
    data, checksum = file.read(item.size), file.read(CHECKSUM.size)
    if CHECKSUM.unpack(checksum)[0] != masked_crc(data):
        raise ValueError("the checksum of the record's data is wrong")
    return pixels(data)


def open_file(path: Location) -> TFRecordSource:
    """One file, whatever it is called."""
    return TFRecordSource(path.parent, ((base_name(path), byte_size(path)),))


def open_folder(folder: Location, names: Sequence[str]) -> TFRecordSource:
    """The records in a folder. Raises InputError if they are one data set at several resolutions."""
    stems: dict[str, str] = {}
    for name in sorted(names):
        stem = RESOLUTION.sub("", PurePosixPath(name).stem)
        if stem in stems:
            raise InputError(
                f"source {str(folder)!r} holds {stem!r} at several resolutions ({stems[stem]!r}, {name!r}): "
                "give the file of the one you want"
            )
        stems[stem] = name
    return TFRecordSource(folder, tuple((name, byte_size(folder / name)) for name in stems.values()))
