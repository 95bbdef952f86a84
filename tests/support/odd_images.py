"""Image files as they lie about in the world, made by code: unusual formats, metadata, colour profiles and damage."""

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from support.source_images import encoded, random_image

SIZE = 16
# CIE xy of red, green and blue.
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))


def colour_profile(name: str, primaries: tuple[tuple[float, float], ...] | None, gamma: float) -> bytes:
    """An ICC profile, version 2, of three primaries with the white point D65; of grey without primaries."""

    def numbers(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    def xyz(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1.0, (1 - x - y) / y])

    d50 = np.array([0.9642, 1.0, 0.8249])
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name.encode() + bytes(79),
        b"wtpt": b"XYZ " + bytes(4) + numbers(*d50),
    }
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        white, columns = xyz(0.3127, 0.3290), np.stack([xyz(*place) for place in primaries], 1)
        bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
        adaptation = np.linalg.inv(bradford) @ np.diag((bradford @ d50) / (bradford @ white)) @ bradford
        matrix = adaptation @ (columns * np.linalg.solve(columns, white))
        for channel, column in zip("rgb", matrix.T, strict=True):
            tags[f"{channel}XYZ".encode()] = b"XYZ " + bytes(4) + numbers(*column)
            tags[f"{channel}TRC".encode()] = curve
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    space = b"GRAY" if primaries is None else b"RGB "
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    head = (head + bytes(12) + b"acsp" + bytes(28) + numbers(*d50)).ljust(128, b"\0")
    return head + struct.pack(">I", len(tags)) + table + body


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation: int = 6) -> bytes:
    """EXIF with an orientation and, in another tag, a rational (-1, 0) that no writer could write again."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHII", 0x011A, 10, 1, 38)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + struct.pack("<ii", -1, 0)


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG, 1 bit a pixel, of any size that its header states. rows: the image's data before it is compressed."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def texts(count: int, length: int, *, key: str = "note", zip: bool = False) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for number in range(count):
        info.add_text(f"{key}{number}", "x" * length, zip=zip)
    return info


def flipped(value: bytes, place: int) -> bytes:
    return value[:place] + bytes([value[place] ^ 0xFF]) + value[place + 1 :]


def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    return encoded(Image.fromarray(random_image(7, SIZE)).convert(mode), kind, **options)


def readable() -> Mapping[str, bytes]:
    """Images that a viewer shows, by a name that says what is odd about them."""
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    plain = Image.Exif()
    plain[0x0112] = 6
    tagged = picture("PNG", exif=exif())
    adobe, p3 = colour_profile("Adobe RGB (1998)", ADOBE_RGB, 2.2), colour_profile("Display P3", DISPLAY_P3, 2.2)
    return {
        "format avif": picture("AVIF"),
        "format jp2": picture("JPEG2000"),
        "format tga": picture("TGA"),
        "format ppm": picture("PPM"),
        "format pcx": picture("PCX"),
        "format sgi": picture("SGI"),
        "format qoi": picture("QOI"),
        "format bmp": picture("BMP"),
        "format gif": picture("GIF"),
        "format mpo": picture("MPO"),
        "format tiff": picture("TIFF"),
        "mode CMYK": picture("JPEG", "CMYK"),
        "mode LA": picture("PNG", "LA"),
        "mode palette": picture("PNG", "P"),
        "mode 1 bit": picture("PNG", "1"),
        **{f"orientation {number} in JPEG": picture("JPEG", exif=exif(number)) for number in range(10)},
        "orientation in PNG": tagged,
        "orientation in WebP": picture("WEBP", exif=exif()),
        "orientation in AVIF": picture("AVIF", exif=plain),
        "EXIF cut in JPEG": picture("JPEG", exif=exif()[:20]),
        "EXIF cut in PNG": picture("PNG", exif=exif()[:30]),
        "EXIF is no EXIF": picture("JPEG", exif=b"Exif\0\0nothing of the kind"),
        "EXIF with a wrong checksum": flipped(tagged, tagged.index(b"eXIf") + 10),
        "EXIF cut at a WebP's end": picture("WEBP", exif=exif())[:-10],
        "a compressed text of 3 MB": picture("PNG", pnginfo=texts(1, 3_000_000, zip=True)),
        "texts of 80 MB": picture("PNG", pnginfo=texts(80, 1_000_000)),
        "XMP of 3 MB": picture("PNG", pnginfo=xmp),
        "a profile of 3 MB in PNG": picture("PNG", icc_profile=bytes(3_000_000)),
        "a profile of 300 kB in JPEG": picture("JPEG", icc_profile=bytes(300_000)),
        "profile Adobe RGB": picture("PNG", icc_profile=adobe),
        "profile Display P3": picture("WEBP", lossless=True, icc_profile=p3),
        "profile Display P3 in JPEG": picture("JPEG", icc_profile=p3),
        "profile sRGB": picture("PNG", icc_profile=srgb_profile()),
        "profile of grey": picture("PNG", "L", icc_profile=colour_profile("Grey", None, 1.8)),
        "profile of grey on colours": picture("PNG", icc_profile=colour_profile("Grey", None, 1.8)),
        "profile of colours on CMYK": picture("JPEG", "CMYK", icc_profile=adobe),
        "profile is junk": picture("PNG", icc_profile=b"junk" * 100),
        "profile is cut": picture("PNG", icc_profile=adobe[:200]),
        **{f"garbage after a {kind}": picture(kind) + b"garbage" * 9 for kind in ("PNG", "JPEG", "WEBP", "GIF")},
    }


def unreadable() -> Mapping[str, tuple[bytes, str]]:
    """Values that are no images: (value, what the reason says)."""
    return {
        "zero bytes": (b"", "^ValueError: 0 bytes$"),
        "zeros": (bytes(500), "^UnidentifiedImageError: cannot identify image file$"),
        "a text": (b"no image at all", "^UnidentifiedImageError: cannot identify image file$"),
        "JPEG XL": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "this Pillow does not read JPEG XL$"),
        "HEIF": (b"\0\0\0\x18ftypheic" + bytes(50), "this Pillow does not read HEIF$"),
        "a web page": (b"<!DOCTYPE html><title>404 Not Found</title>", "cannot identify"),
        "cut PNG": (picture("PNG")[:-300], "truncated"),
        "cut JPEG": (picture("JPEG")[:-200], "(?i)truncated"),
        "cut WebP": (picture("WEBP")[:60], "(?i)decode|cannot identify|truncated"),
        "cut TIFF": (picture("TIFF")[:-300], "."),
        "cut AVIF": (picture("AVIF")[:-100], "."),
        "flipped in a PNG": (flipped(picture("PNG"), 300), "(?i)broken|crc|checksum|data stream|truncated|Error"),
        "flipped in a header": (flipped(picture("PNG"), 18), "."),
        "200 megapixels": (png(20_000, 10_000, bytes(9)), "^TooLargeError: 20000x10000 pixels, more than --max-pixels"),
        "4 gigapixels": (png(65_535, 65_535, bytes(9)), "^TooLargeError: 65535x65535 pixels, more than --max-pixels"),
        "floats": (encoded(Image.fromarray(np.zeros((16, 16), np.float32)), "TIFF"), "mode 'F' states no range"),
    }


def show(value: bytes) -> np.ndarray:
    """The pixels of an image as Pillow alone decodes them, with its profile and its orientation not looked at."""
    with Image.open(io.BytesIO(value)) as image:
        return np.asarray(image.convert("RGB"))
