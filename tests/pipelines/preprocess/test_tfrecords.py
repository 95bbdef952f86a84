"""StyleGAN's TFRecords, from bytes put together here by hand: the framing, the checksums and the message in them."""

import struct
from pathlib import Path

import numpy as np
import pytest
from support.source_images import bytes_read, random_image, read_all
from upath import UPath

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.open import list_items, open_source
from pipelines.preprocess.sources.tfrecords import is_tfrecord, masked_crc


def bitwise_crc32c(data: bytes) -> int:
    """The definition: division by Castagnoli's polynomial, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = bitwise_crc32c(data)
    rotated = (crc >> 15) | (crc % 2**15) << 17
    return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number % 128 | 128]) + varint(number >> 7)


def field(number: int, content: bytes) -> bytes:
    """A protocol buffer's field of bytes or of a message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(shape: list[int], data: bytes, *, packed: bool = True) -> bytes:
    numbers = [varint(number) for number in shape]
    int64_list = field(1, b"".join(numbers)) if packed else b"".join(varint(1 << 3) + number for number in numbers)
    features = {
        b"shape": field(3, int64_list),
        b"label": field(2, field(1, bytes(4))),
        b"data": field(1, field(1, data)),
    }
    entries = [field(1, field(1, name) + field(2, feature)) for name, feature in features.items()]
    return field(1, b"".join(entries))


def example_of(pixels: np.ndarray) -> bytes:
    return example(
        [pixels.shape[2], *pixels.shape[:2]], b"".join(pixels[..., c].tobytes() for c in range(pixels.shape[2]))
    )


def write(path: Path, pixels: list[np.ndarray]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(record(example_of(image)) for image in pixels))
    return path


def test_the_checksum_is_that_of_the_standard() -> None:
    assert bitwise_crc32c(b"123456789") == 0xE3069283  # the published check value
    for data in (b"", b"123456789", bytes(range(256)) * 3):
        assert struct.pack("<I", masked_crc(data)) == masked(data)
    assert is_tfrecord(record(b"data"))
    assert not is_tfrecord(record(b"data")[:11])
    assert not is_tfrecord(bytes(12))


def test_records_give_their_pixels_under_file_and_number(tmp_path: Path) -> None:
    images = [random_image(number)[:, : 3 + number % 4] for number in range(12)]  # not square: no axis can be mistaken
    source = open_source(write(tmp_path / "celebahq-r03.tfrecords", images))
    values = read_all(source)
    assert list(values) == [f"celebahq-r03/{number:08d}" for number in range(12)]
    for value, image in zip(values.values(), images, strict=True):
        np.testing.assert_array_equal(value, image)
    assert source.name == "celebahq"
    assert source.facts() == {
        "kind": "tfrecords",
        "files": {"celebahq-r03.tfrecords": (tmp_path / "celebahq-r03.tfrecords").stat().st_size},
    }


def test_shape_may_be_packed_or_not_and_an_image_grey(tmp_path: Path) -> None:
    grey = random_image(0)[..., :1]
    (tmp_path / "any name").write_bytes(
        record(example_of(grey)) + record(example([1, 8, 8], grey.tobytes(), packed=False))
    )  # recognised by content
    values = list(read_all(open_source(tmp_path / "any name")).values())
    np.testing.assert_array_equal(values[0], grey)
    np.testing.assert_array_equal(values[1], grey)


def test_a_folder_of_files_is_read_as_one_and_from_an_object_store(tmp_path: Path, s3_bucket: str) -> None:
    folder, remote = tmp_path / "set", UPath(f"{s3_bucket}/{tmp_path.name}/set")
    for part in ("b", "a"):
        path = write(folder / f"faces-{part}.tfrecords", [random_image(ord(part) + number) for number in range(3)])
        (remote / path.name).write_bytes(path.read_bytes())
    (folder / "faces.labels").write_bytes(b"x")
    source = open_source(folder)
    values = read_all(source)
    assert list(values) == [f"faces-{part}/{number:08d}" for part in "ab" for number in range(3)]
    np.testing.assert_array_equal(values["faces-b/00000002"], random_image(ord("b") + 2))
    assert source.name == "set"
    far = open_source(remote)
    assert far.items() == source.items()
    assert far.facts() == source.facts()
    for (_, value), near in zip(far.read(far.items()), values.values(), strict=True):
        np.testing.assert_array_equal(value, near)


def test_one_set_at_several_resolutions_is_refused(tmp_path: Path) -> None:
    for resolution in (2, 3):
        write(tmp_path / f"celebahq-r{resolution:02d}.tfrecords", [random_image(0, 1 << resolution)])
    message = (
        r"holds 'celebahq' at several resolutions \('celebahq-r02.tfrecords', 'celebahq-r03.tfrecords'\): give the file"
    )
    with pytest.raises(InputError, match=message):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "celebahq-r03.tfrecords").items()) == 1


def test_a_broken_record_costs_only_itself(tmp_path: Path) -> None:
    good = example_of(random_image(0))
    flipped = bytearray(record(good))
    flipped[60] ^= 1
    other = field(1, field(1, field(1, b"image/encoded") + field(2, field(1, field(1, b"x")))))
    wrong_shape = example([3, 8, 9], bytes(192))
    no_pixels = example([3, 0, 8], b"")
    parts = [record(good), bytes(flipped), record(b"no message"), record(other), record(wrong_shape), record(no_pixels)]
    (tmp_path / "x.tfrecords").write_bytes(b"".join([*parts, record(b""), record(good)]))
    values = list(read_all(open_source(tmp_path / "x.tfrecords")).values())
    reasons = [str(value) for value in values if isinstance(value, Exception)]
    assert len(reasons) == 6
    assert reasons[0] == "the checksum of the record's data is wrong"
    assert reasons[2] == "the record has the features ['image/encoded']: 'shape' and 'data' are wanted"
    assert reasons[3] == "the record has the shape [3, 8, 9] and 192 bytes: [channels, height, width] is wanted"
    np.testing.assert_array_equal(values[0], random_image(0))
    np.testing.assert_array_equal(values[-1], random_image(0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("length", r"is damaged at record 2 \(the checksum of its length is wrong\), and what follows cannot be found"),
        ("cut in data", r"is damaged at record 2 \(it ends beyond the file's \d+ bytes\)"),
        ("cut in header", r"is damaged at record 2 \(the checksum of its length is wrong\)"),
    ],
)
def test_a_file_whose_records_cannot_be_found_is_refused(damage: str, message: str, tmp_path: Path) -> None:
    one = record(example_of(random_image(0)))
    content = bytearray(one * 3)
    if damage == "length":
        content[2 * len(one)] ^= 1
    del content[len(content) if damage == "length" else 2 * len(one) + (100 if damage == "cut in data" else 7) :]
    (tmp_path / "x.tfrecords").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "x.tfrecords").items()


def test_a_first_record_that_is_no_image_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "x.tfrecords").write_bytes(record(field(1, b"")))
    message = r"its first value, 'x/00000000', cannot be read: the record has the features \[\]: 'shape' and 'data' are wanted"
    with pytest.raises(InputError, match=message):
        list_items(open_source(tmp_path / "x.tfrecords"), tmp_path / "x.tfrecords")


def test_listing_reads_no_record(tmp_path: Path) -> None:
    once = record(b"\x00" * 200_000)
    (tmp_path / "x.tfrecords").write_bytes(once * 50)
    source = open_source(tmp_path / "x.tfrecords")
    assert bytes_read(source.items) < 50 * 20_000  # of 10 million
