"""CIFAR-10 in the three forms it is published in: one set of images, under one set of keys, and nothing executed."""

import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.source_images import decoded, read_all, write_tar
from upath import UPath

from ddpm_core.errors import InputError
from pipelines.preprocess.sources.cifar import CifarSource
from pipelines.preprocess.sources.open import list_items, open_source

TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
# In place of 50,000 and 10,000. No multiple of five: the first three batches have a row more than the others.
ROWS = {"train": 303, "test": 60}


def python_2_pickle(rows: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2's cPickle wrote the official ones: protocol 2, text as bytes, numpy under its old names."""
    pixels = rows.tobytes()
    return b"".join(
        [
            b"\x80\x02}q\x01(",
            b"U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03",
            b"U\x06labelsq\x04]q\x05(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e",
            b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\tU\x01bq\n\x87Rq\x0b",
            b"(K\x01M" + struct.pack("<H", len(rows)) + b"M\x00\x0c\x86q\x0c",
            b"cnumpy\ndtype\nq\rU\x02u1q\x0eK\x00K\x01\x87Rq\x0f",
            b"(K\x03U\x01|q\x10NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89T" + struct.pack("<i", len(pixels)) + pixels + b"tb",
            b"U\tfilenamesq\x11]q\x12U\x0eleptodac_s.pngq\x13au.",
        ]
    )


def binary(rows: np.ndarray, labels: list[int]) -> bytes:
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, rows, strict=True))


def pack(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    members = {f"{folder}/{name}": content for name, content in {**files, "readme.html": b"x"}.items()}
    return write_tar(path, {f"{folder}/": b"", **members}, "w:gz")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little CIFAR-10 with pixels by number: Python and binary, packed and unpacked. Its batches lie out of order, as
    in the official file."""
    folder = tmp_path_factory.mktemp("cifar")
    pixels = np.random.default_rng(0).integers(0, 256, (sum(ROWS.values()), 3, 32, 32), np.uint8)
    np.save(folder / "pixels.npy", pixels)
    write_forms(folder, pixels[: ROWS["train"]], pixels[ROWS["train"] :])
    return folder


def write_forms(folder: Path, train: np.ndarray, test: np.ndarray) -> None:
    parts = dict(zip([*TRAIN, "test_batch"], [*np.array_split(train, 5), test], strict=True))
    for name, suffix, write in (("py", "", python_2_pickle), ("bin", ".bin", binary)):
        order = [*TRAIN[3:], *TRAIN[:3], "test_batch"]
        files = {batch + suffix: write(parts[batch].reshape(-1, 3072), [3] * len(parts[batch])) for batch in order}
        (folder / f"cifar-10-batches-{name}").mkdir()
        for file, content in files.items():
            (folder / f"cifar-10-batches-{name}" / file).write_bytes(content)
        packed = "python" if name == "py" else "binary"
        pack(folder / f"cifar-10-{packed}.tar.gz", f"cifar-10-batches-{name}", files)


FORMS = ["cifar-10-python.tar.gz", "cifar-10-binary.tar.gz", "cifar-10-batches-py", "cifar-10-batches-bin"]


def test_the_fixture_is_what_python_2_wrote(forms: Path) -> None:
    content = (forms / "cifar-10-batches-py" / "data_batch_2").read_bytes()
    batch = pickle.loads(content, encoding="bytes")  # the unrestricted reader, of a file written here
    np.testing.assert_array_equal(batch[b"data"].reshape(-1, 3, 32, 32), np.load(forms / "pixels.npy")[61:122])
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    assert {"SHORT_BINSTRING", "BINSTRING", "GLOBAL"} <= opcodes
    assert not {"BINUNICODE", "STACK_GLOBAL", "SHORT_BINBYTES"} & opcodes


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_official_order(form: str, forms: Path) -> None:
    pixels = np.load(forms / "pixels.npy").transpose(0, 2, 3, 1)
    train, test = np.split(pixels, [ROWS["train"]])
    for split, expected in [(None, train), ("train", train), ("test", test)]:
        source = open_source(forms / form, split=split)
        assert isinstance(source, CifarSource)
        values = read_all(source)
        assert list(values) == [f"{split or 'train'}/{row:08d}" for row in range(len(expected))]
        np.testing.assert_array_equal(np.stack([decoded(value) for value in values.values()]), expected)
        assert source.name == ("cifar10_test" if split == "test" else "cifar10")
        assert source.facts()["split"] == (split or "train")


def test_the_authors_files_and_hugging_faces_parquet_are_one_data_set(shared_data: Path, tmp_path: Path) -> None:
    tables = {
        "train": pq.ParquetFile(shared_data / "cifar10" / "train-00000-of-00003.parquet").read_row_group(0),
        "test": pq.ParquetFile(shared_data / "cifar10" / "test-00000-of-00001.parquet").read_row_group(0),
    }
    pixels = {}
    for split, table in tables.items():
        rows = table.slice(0, 500)
        pq.write_table(rows, tmp_path / f"{split}-00000-of-00001.parquet", row_group_size=100)
        images = [decoded(row["bytes"]) for row in rows.column("img").to_pylist()]
        pixels[split] = np.stack(images).transpose(0, 3, 1, 2)
    (tmp_path / "authors").mkdir()
    write_forms(tmp_path / "authors", pixels["train"], pixels["test"])
    for split in tables:
        published = read_all(open_source(tmp_path, split=split))
        assert len(published) == 500
        for form in FORMS[:2]:
            values = read_all(open_source(tmp_path / "authors" / form, split=split))
            assert list(values) == list(published)
            for key, value in values.items():
                np.testing.assert_array_equal(value, decoded(published[key]))


def test_an_object_store_gives_the_same(forms: Path, s3_bucket: str) -> None:
    for form in FORMS[:2]:
        remote = UPath(f"{s3_bucket}/{form}")
        remote.write_bytes((forms / form).read_bytes())
        source = open_source(remote, split="test")
        assert source.facts() == open_source(forms / form, split="test").facts()
        near = read_all(open_source(forms / form, split="test"))
        for key, value in read_all(source).items():
            np.testing.assert_array_equal(value, near[key])


class Malicious:
    """Calls something when it is unpickled."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_calls_anything_is_refused_and_nothing_runs(protocol: int, forms: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for batch in TRAIN:
        (folder / batch).write_bytes((forms / folder.name / batch).read_bytes())
    rows = np.zeros((1, 3072), np.uint8)
    payloads = {
        "builtins.eval": pickle.dumps({"data": Malicious(eval, f"open({str(mark)!r}, 'w')")}, protocol),
        "io.open": pickle.dumps({"data": rows, "x": Malicious(open, str(mark), "w")}, protocol),
        "posix.system": b"\x80\x02cposix\nsystem\nU\x02:;\x85R.",
    }
    for function, payload in payloads.items():
        (folder / "data_batch_3").write_bytes(payload)
        source = open_source(folder)
        message = r"cannot be read as CIFAR-10 \(data_batch_3: it asks for [\w.]+, which no array of pixels needs\)"
        with pytest.raises(InputError, match=message):
            list_items(source, folder)
        assert not mark.exists(), function
    pickle.loads(payloads["io.open"]).clear()  # an unrestricted reader runs it
    assert mark.exists()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x80\x02cnumpy\nndarray\n(K\x09tR.", "'str' object is not callable"),  # no uninitialised memory
        (b"\x80\x02cnumpy\ndtype\nU\x02O8\x85R.", r"an array of b'O8', not of 'u1'"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x01\x85NNNtb.", "an array without a dtype"),
        (b"\x80\x02}.", "no 'data' of rows of 3,072 bytes"),
        (b"\x80\x02]q\x01.", "no 'data' of rows of 3,072 bytes"),
        (b"", "Ran out of input"),
    ],
)
def test_a_pickle_of_anything_else_is_refused(payload: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(payload)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path, split="test").items()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numpy\ndtype", "missing 1 required positional argument"),
        ("numpy.core.multiarray\n_reconstruct", "missing 1 required positional argument"),
        ("_codecs\nencode", "no 'data' of rows"),  # a stand-in made for this pickle alone
        ("numpy\nndarray", "'str' object has no attribute"),
    ],
)
def test_a_pickle_cannot_change_its_reader(name: str, message: str, forms: Path, tmp_path: Path) -> None:
    # "Set the attributes __defaults__ and __init__ of what this name stands for; the result is an empty dictionary."
    attributes = b"N}(X\x0c\x00\x00\x00__defaults__)X\x08\x00\x00\x00__init__)u\x86b"
    (tmp_path / "test_batch").write_bytes(b"\x80\x02c" + name.encode() + b"\n" + attributes + b"0}.")
    with pytest.raises(InputError, match=message):
        open_source(tmp_path, split="test").items()
    assert len(read_all(open_source(forms / "cifar-10-batches-py", split="test"))) == ROWS["test"]


def test_what_python_3_pickles_for_python_2_is_read_too(tmp_path: Path) -> None:
    rows = np.arange(2 * 3072, dtype=np.uint16).astype(np.uint8).reshape(2, 3072)
    for name, array in {"rows": rows, "columns": np.asfortranarray(rows)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test_batch").write_bytes(pickle.dumps({"data": array, "labels": [0, 1]}, protocol=2))
        values = read_all(open_source(tmp_path / name, split="test"))
        assert len(values) == 2
        for value, row in zip(values.values(), rows, strict=True):
            np.testing.assert_array_equal(value, row.reshape(3, 32, 32).transpose(1, 2, 0))


def test_a_missing_or_damaged_batch_is_named(forms: Path, tmp_path: Path) -> None:
    whole = {batch: (forms / "cifar-10-batches-bin" / f"{batch}.bin").read_bytes() for batch in TRAIN}
    some = {f"{batch}.bin": content for batch, content in whole.items() if batch != "data_batch_4"}
    packed = pack(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", some)
    with pytest.raises(
        InputError, match=r"cannot be read as CIFAR-10 \(it has no data_batch_4.bin\): download it again"
    ):
        open_source(packed).items()
    uneven = pack(tmp_path / "uneven.tar.gz", "cifar-10-batches-bin", some | {"data_batch_4.bin": bytes(3000)})
    with pytest.raises(InputError, match=r"data_batch_4.bin: 3,000 bytes are no whole number of rows of 3,073"):
        open_source(uneven).items()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes((forms / "cifar-10-python.tar.gz").read_bytes()[:-400_000])
    with pytest.raises(InputError, match=r"cannot be read as CIFAR-10 \(.*\): download it again from its authors"):
        open_source(cut).items()
    with pytest.raises(InputError, match=r"--split is 'valid', but source .* has only train, test: give one of these"):
        open_source(packed, split="valid")
