"""An encoded image without what is not pixels, for when a decoder stumbles over that."""

import struct
from collections.abc import Callable, Iterator


def without_metadata(value: bytes) -> Iterator[bytes]:
    """A PNG, JPEG or WebP first without texts and the like, then also without what says how the pixels are shown: its
    orientation and its profile. Nothing for other kinds, and for a file whose parts cannot be told apart."""
    strip = next((strip for is_kind, strip in STRIPPERS if is_kind(value)), None)
    if strip is None:
        return
    for keep_shown in (True, False):
        try:
            yield strip(value, keep_shown)
        except (struct.error, IndexError):
            return


def _bare_png(value: bytes, keep_shown: bool) -> bytes:
    """8 bytes, then chunks: length | type | data | CRC. A type in lower case is of no need for the pixels, but tRNS."""
    parts, start = [value[:8]], 8
    while start < len(value):
        length, kind = struct.unpack_from(">I4s", value, start)
        end = start + 12 + length
        if kind[:1].isupper() or kind == b"tRNS" or (keep_shown and kind in (b"eXIf", b"iCCP")):
            parts.append(value[start:end])
        start = end
    return b"".join(parts)


def _bare_jpeg(value: bytes, keep_shown: bool) -> bytes:
    """FF D8, then segments: FF, marker, length | data; from the first scan (DA) on everything is pixels."""
    parts, start = [value[:2]], 2
    while value[start + 1] != 0xDA:
        if value[start] != 0xFF:
            raise IndexError(f"no marker at byte {start}")
        marker = value[start + 1]
        if marker == 0xFF:  # a byte of padding
            start += 1
            continue
        end = start + 2 + struct.unpack_from(">H", value, start + 2)[0]
        # APP0 and APP14 say how colours are coded; the other APPs and comments (FE) say nothing of it.
        if not (0xE1 <= marker <= 0xEF or marker == 0xFE) or marker == 0xEE or (keep_shown and marker in (0xE1, 0xE2)):
            parts.append(value[start:end])
        start = end
    return b"".join([*parts, value[start:]])


def _bare_webp(value: bytes, keep_shown: bool) -> bytes:
    """RIFF, size, WEBP, then chunks: type | length | data, padded to an even number of bytes."""
    flags = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
    shown = (b"ICCP", b"EXIF") if keep_shown else ()
    parts, start = [b"WEBP"], 12
    while start + 8 <= len(value):
        kind, length = struct.unpack_from("<4sI", value, start)
        end = start + 8 + length + length % 2
        chunk = value[start:end]
        if kind == b"VP8X":
            gone = sum(flag for name, flag in flags.items() if name not in shown)
            parts.append(chunk[:8] + bytes([chunk[8] & ~gone]) + chunk[9:])
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF") or (kind in shown and end <= len(value)):
            parts.append(chunk)
        start = end
    content = b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(content)) + content


STRIPPERS: tuple[tuple[Callable[[bytes], bool], Callable[[bytes, bool], bytes]], ...] = (
    (lambda value: value.startswith(b"\x89PNG\r\n\x1a\n"), _bare_png),
    (lambda value: value.startswith(b"\xff\xd8"), _bare_jpeg),
    (lambda value: value[:4] == b"RIFF" and value[8:12] == b"WEBP", _bare_webp),
)
