"""PNG artifacts -> pictures inside the page: checked, cut to the first tiles or reduced to a byte budget, and
encoded as data URIs. Pixels are kept as they are wherever the budget allows."""

import base64
import io
import math
from dataclasses import dataclass

from PIL import Image

from reports.entities import GridLayout


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture to show at `width` x `height` CSS pixels. `reduced` says by how much its pixels were reduced
    to fit (1: not at all)."""

    uri: str
    width: int
    height: int
    reduced: int = 1


class UnreadablePicture(ValueError):
    """The bytes are not a PNG that can be decoded."""


def arranged(content: bytes, layout: GridLayout | None, *, most: int | None = None) -> bytes:
    """A grid's tiles (the first `most` of them) in a square, in their order, with thin transparent gaps. Tiles too
    small to be seen are enlarged smoothly, see `enlargement`. Unchanged where the layout is unknown or is not that
    of the image."""
    image = _decode(content)
    if layout is None or not _fits(image, layout):
        return content
    height, width = layout.tile
    count = min(layout.count, most or layout.count)
    columns = math.ceil(math.sqrt(count))
    scale = enlargement(layout)
    wide, high = width * scale, height * scale
    gap = max(1, wide // 16)
    mode = "LA" if image.mode == "L" else "RGBA"
    sheet = Image.new(mode, (columns * (wide + gap) - gap, math.ceil(count / columns) * (high + gap) - gap))
    for place in range(count):
        x, y = place % layout.columns * width, place // layout.columns * height
        across, down = place % columns, place // columns
        tile = image.crop((x, y, x + width, y + height)).resize((wide, high), Image.Resampling.BICUBIC)
        sheet.paste(tile.convert(mode), (across * (wide + gap), down * (high + gap)))
    return _encode(sheet)


def enlargement(layout: GridLayout | None) -> int:
    """By how much tiles are enlarged: an image below 16 pixels is unreadable as blocks, so it becomes 64 or more."""
    side = max(layout.tile) if layout else 16
    return 1 if side >= 16 else -(-64 // side)


def picture(content: bytes, *, target: int, budget: int) -> Picture:
    """The whole image, enlarged by a whole factor towards `target` CSS pixels wide (a smaller one is never
    made blurred), as at most `budget` bytes of PNG: reduced by 2, 4, ... if it is larger."""
    image = _decode(content)
    width, height = image.size
    scale = max(1, target // width)
    reduced = 1
    while len(content) > budget and min(image.size) > 1:
        reduced *= 2
        image = image.reduce(2)
        content = _encode(image)
    return Picture(uri=_uri(content), width=width * scale, height=height * scale, reduced=reduced)


def _fits(image: Image.Image, layout: GridLayout) -> bool:
    height, width = layout.tile
    if min(height, width, layout.columns, layout.count) < 1:
        return False
    return image.size == (layout.columns * width, math.ceil(layout.count / layout.columns) * height)


def _decode(content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadablePicture(str(error)) from error
    return image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
