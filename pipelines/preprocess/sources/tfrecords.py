"""The TFRecords of ProgressiveGAN and StyleGAN, such as celebahq-r08.tfrecords, read without TensorFlow.

A record is its length (uint64), the length's checksum, the data, the data's checksum, all little-endian; the checksums
are CRC-32C, rotated and shifted ("masked"). The data is a `tf.train.Example`, a protocol buffer, with the features
`shape` (channels, height, width) and `data` (uint8 in that order).
"""

import itertools
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.items import Item, Value, byte_size, label, open_bytes
from pipelines.runtime.locations import Location

SUFFIX = ".tfrecords"
RESOLUTION = re.compile(r"-r\d\d$")  # celebahq-r08 is 2**8 pixels wide
HEADER = struct.Struct("<QI")
CHECKSUM = struct.Struct("<I")


def _field(name: str, number: int, kind: str, label: str = "LABEL_OPTIONAL") -> str:
    typed = f"type: {kind}" if kind.startswith("TYPE_") else f"type: TYPE_MESSAGE type_name: '{kind}'"
    return f"field {{ name: '{name}' number: {number} label: {label} {typed} }}"


# The part of tensorflow/core/example that is used here, field by field. A map travels as a list of key and value.
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
    """The CRC-32C of a record's part as it is stored, so that the checksum of data with checksums in it is no risk."""
    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def is_tfrecord(head: bytes) -> bool:
    """Whether a file's first bytes are a length and its checksum."""
    return len(head) >= HEADER.size and HEADER.unpack_from(head)[1] == masked_crc(head[:8])


def pixels(record: bytes) -> np.ndarray:
    """The image of one Example: uint8 [H, W, C]. ValueError for any other Example, DecodeError for none."""
    features = {entry.key: entry.value for entry in Example.FromString(record).features.feature}
    if not {"shape", "data"} <= features.keys():
        raise ValueError(f"the record has the features {sorted(features)}: 'shape' and 'data' are wanted")
    shape, data = list(features["shape"].int64_list.value), b"".join(features["data"].bytes_list.value)
    if len(shape) != 3 or min(shape) < 1 or shape[0] * shape[1] * shape[2] != len(data):
        raise ValueError(f"the record has the shape {shape} and {len(data)} bytes: [channels, height, width] is wanted")
    return np.frombuffer(data, np.uint8).reshape(shape).transpose(1, 2, 0)


@dataclass(frozen=True)
class TFRecordSource:
    """Files of records. An item carries its record's first byte of data and the number of bytes; its key names the file."""

    folder: Location
    files: tuple[tuple[str, int], ...]
    """Names and bytes."""

    @property
    def name(self) -> str:
        only = self.files[0][0] if len(self.files) == 1 else label(self.folder)
        return RESOLUTION.sub("", only.removesuffix(SUFFIX))

    def items(self) -> list[Item]:
        return sorted(item for name, size in self.files for item in self._records(name, size))

    def _records(self, name: str, size: int) -> Iterator[Item]:
        with open_bytes(self.folder / name) as file:
            at = 0
            for number in itertools.count():
                file.seek(at)
                header = file.read(HEADER.size)
                if not header:
                    return
                length = int.from_bytes(header[:8], "little")
                if not is_tfrecord(header):
                    reason = "the checksum of its length is wrong"
                elif at + HEADER.size + length + CHECKSUM.size > size:
                    reason = f"it ends beyond the file's {size:,} bytes"
                else:
                    yield Item(f"{name.removesuffix(SUFFIX)}/{number:08d}", at + HEADER.size, length)
                    at += HEADER.size + length + CHECKSUM.size
                    continue
                raise InputError(
                    f"source {str(self.folder / name)!r} is damaged at record {number} ({reason}), and what follows cannot be "
                    "found: download or make it again"
                )

    def read(self, items: Sequence[Item]) -> Iterator[tuple[str, Value]]:
        for stem, group in itertools.groupby(items, key=lambda item: item.key.rsplit("/", 1)[0]):
            names = [name for name, _ in self.files if name.removesuffix(SUFFIX) == stem]
            with open_bytes(self.folder / names[0]) as file:
                for item in group:
                    file.seek(item.offset)
                    data, checksum = file.read(item.size), file.read(CHECKSUM.size)
                    value: Value
                    try:
                        if CHECKSUM.unpack(checksum)[0] != masked_crc(data):
                            raise ValueError("the checksum of the record's data is wrong")
                        value = pixels(data)
                    except (ValueError, DecodeError, struct.error) as error:
                        value = error
                    yield item.key, value

    def facts(self) -> dict[str, Any]:
        return {"kind": "tfrecords", "files": dict(self.files)}


def open_file(place: Location) -> TFRecordSource:
    """One file, whatever it is called."""
    return TFRecordSource(place.parent, ((label(place), byte_size(place)),))


def open_folder(folder: Location, names: Sequence[str]) -> TFRecordSource:
    """The records in a folder. InputError where they are one data set at several resolutions."""
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
