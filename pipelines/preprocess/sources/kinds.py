"""Which files are images: by their names, and if these say nothing by how the files begin.

All others are counted by kind, so that what a source holds and is not read is told.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

IMAGE = "image"
HIDDEN = "hidden"
# Suffixes of what Pillow reads, in this version or another; an image that it does not read is listed, not passed over.
_IMAGES = """
.png .apng .jpg .jpeg .jpe .jfif .jif .jfi .mpo .webp .bmp .dib .tif .tiff .gif .avif .avifs .heic .heif .jxl
.jp2 .j2k .j2c .jpc .jpf .jpx .tga .icb .vda .vst .ppm .pgm .pbm .pnm .pfm .pcx .qoi .sgi .psd .dds .ico .icns
"""
# Suffixes that say that there is no image, so that millions of captions need not be opened.
_OTHERS = """
.txt .json .jsonl .csv .tsv .xml .yaml .yml .toml .html .htm .md .rst .log .py .ipynb .sh .npy .npz .pt .pth .pkl .mat
.safetensors .h5 .parquet .arrow .tfrecords .labels .mdb .db .sqlite .zip .tar .gz .tgz .bz2 .xz .zst .7z .rar .sha256
.md5 .pdf .doc .docx .svg .wav .mp3 .flac .mp4 .mov .avi .mkv .webm
"""
IMAGE_SUFFIXES, OTHER_SUFFIXES = frozenset(_IMAGES.split()), frozenset(_OTHERS.split())
HEAD_BYTES = 32  # how many bytes `begins_as_image` needs
# Signatures of at least three bytes: a text must not be taken for an image.
SIGNATURES = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\0\0\0\x0cjP  \r\n\x87\n",
    b"\xff\x4f\xff\x51",
    b"\0\0\0\x0cJXL \r\n\x87\n",
    b"qoif",
    b"8BPS\0\x01",
    b"DDS \x7c\0\0\0",
    b"\x01\xda\x00\x01",  # SGI
    b"\x01\xda\x01\x01",
    b"\x59\xa6\x6a\x95",  # Sun
)
BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"})
NETPBM = re.compile(rb"P[1-6]\s+(#.*\n\s*)*\d+\s+\d+\s")


def kind_of_name(name: str) -> str | None:
    """IMAGE, or what kind of other file a path with slashes names: hidden (macOS's `__MACOSX` too), or a suffix.

    None if only the first bytes can tell.
    """
    path = PurePosixPath(name)
    if any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in path.parts):
        return HIDDEN
    suffix = path.suffix.lower()
    return IMAGE if suffix in IMAGE_SUFFIXES else suffix if suffix in OTHER_SUFFIXES else None


def kind_of_file(name: str, head: bytes) -> str:
    """IMAGE, or the kind of another file, by its name and first bytes."""
    kind = kind_of_name(name)
    return kind if kind is not None else IMAGE if begins_as_image(head) else other_kind(name)


def other_kind(name: str) -> str:
    """What a file that is not read is counted as: hidden, or its suffix."""
    if kind_of_name(name) == HIDDEN:
        return HIDDEN
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if re.fullmatch(r"\.(?=.*[a-z])[a-z0-9_-]{1,12}", suffix) else "without a suffix"


def begins_as_image(head: bytes) -> bool:
    return (
        head.startswith(SIGNATURES)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in BRANDS)
        or (
            head[:2] == b"BM"
            and head[6:10] == bytes(4)
            and head[14:18] in (b"\x0c\0\0\0", b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0")
        )
        or NETPBM.match(head) is not None
    )


def count(kinds: Iterable[str]) -> dict[str, int]:
    """How many there are of each kind, ascending by kind."""
    return dict(sorted(Counter(kinds).items()))
