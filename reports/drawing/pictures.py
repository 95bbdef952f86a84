"""PNG artifacts -> pictures inside the page: checked, cut to tiles, kept to a byte budget, and encoded as data URIs.

Pixels are kept as they are if the budget allows; else they are compressed as WebP, then reduced.
"""

import base64
import io
import math
from dataclasses import dataclass

from PIL import Image

from reports.records.entities import GridLayout


@dataclass(frozen=True, kw_only=True)
class InlineImage:
    """A picture as a data URI, to show at `width` x `height` CSS pixels. `lossy` says that it was compressed to fit,
    `reduced` by how much its pixels were reduced besides (1: not at all)."""

    uri: str
    width: int
    height: int
    lossy: bool = False
    reduced: int = 1

    @property
    def note(self) -> str:
        """What was done to it, as a sentence that goes on a caption; empty if nothing was."""
        if not self.lossy:
            return ""
        return (
            " Compressed"
            + (f" and at 1/{self.reduced} of its width" if self.reduced > 1 else "")
            + (" to keep this file small; MLflow has the original.")
        )


class UnreadablePicture(ValueError):
    """The bytes are not a PNG that can be decoded."""


def square_sheet(content: bytes, layout: GridLayout | None, *, most: int | None = None) -> bytes:
    """A grid's tiles (the first `most` of them) in a square, in their order, with thin transparent gaps. Tiles too small to
    be seen are enlarged smoothly, see `enlargement`. Unchanged if the layout is unknown or is not that of the image. Raises
    UnreadablePicture."""
    image = _decode(content)
    if layout is None or min(*layout.tile, layout.columns, layout.count) < 1:
        return content
    height, width = layout.tile
    if image.size != (layout.columns * width, math.ceil(layout.count / layout.columns) * height):
        return content
    count = min(layout.count, most or layout.count)
    return _encode(_sheet(image, layout.tile, layout.columns, count, math.ceil(math.sqrt(count))))


def spaced_grid(content: bytes, tile: tuple[int, int], rows: int, columns: int) -> bytes:
    """A grid's tiles as they lie, with thin transparent gaps, small ones enlarged. Raises UnreadablePicture, also if the
    image is not such a grid."""
    image = _decode(content)
    if min(*tile, rows, columns) < 1 or image.size != (columns * tile[1], rows * tile[0]):
        raise UnreadablePicture(f"{image.size[0]} x {image.size[1]} pixels are no {rows} x {columns} tiles of {tile}")
    return _encode(_sheet(image, tile, columns, rows * columns, columns))


def enlargement(side: int) -> int:
    """By how much tiles are enlarged: an image below 16 pixels is unreadable as blocks, so it becomes 64 or more."""
    return 1 if side >= 16 else -(-64 // side)


def inline(content: bytes, *, target: int, budget: int) -> InlineImage:
    """The whole image, enlarged by a whole factor towards `target` CSS pixels wide and not much higher (a smaller one is
    never blurred), as at most `budget` bytes: PNG, else WebP, else that reduced by 2, 4, ... Raises UnreadablePicture."""
    image = _decode(content)
    width, height = image.size
    scale = max(1, min(target // width, target // height))
    lossy, reduced = len(content) > budget, 1
    if lossy:
        content = _encode(image, lossy=True)
    while len(content) > budget and min(image.size) > 1:
        reduced *= 2
        image = image.reduce(2)
        content = _encode(image, lossy=True)
    uri = f"data:image/{'webp' if lossy else 'png'};base64,{base64.b64encode(content).decode('ascii')}"
    return InlineImage(uri=uri, width=width * scale, height=height * scale, lossy=lossy, reduced=reduced)


def _sheet(image: Image.Image, tile: tuple[int, int], source_columns: int, count: int, columns: int) -> Image.Image:
    """The first `count` tiles of a grid of `source_columns`, in order, in `columns` columns."""
    height, width = tile
    scale = enlargement(max(tile))
    wide, high = width * scale, height * scale
    gap = max(1, wide // 16)
    mode = "LA" if image.mode == "L" else "RGBA"
    sheet = Image.new(mode, (columns * (wide + gap) - gap, math.ceil(count / columns) * (high + gap) - gap))
    for place in range(count):
        x, y = place % source_columns * width, place // source_columns * height
        across, down = place % columns, place // columns
        cut = image.crop((x, y, x + width, y + height)).resize((wide, high), Image.Resampling.BICUBIC)
        sheet.paste(cut.convert(mode), (across * (wide + gap), down * (high + gap)))
    return sheet


def _decode(content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadablePicture(str(error)) from error
    return image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")


def _encode(image: Image.Image, lossy: bool = False) -> bytes:
    buffer = io.BytesIO()
    if lossy:
        image.convert("RGBA" if "A" in image.mode else "RGB").save(buffer, "WEBP", quality=90)
    else:
        image.save(buffer, "PNG")  # to optimise takes five times as long for 2 % of the bytes
    return buffer.getvalue()
