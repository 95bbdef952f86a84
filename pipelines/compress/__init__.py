"""Images to coded files and back."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.compress.curve import describe_curve, measure_curve
    from pipelines.compress.files import decode_files, encode_files

__all__ = ["decode_files", "describe_curve", "encode_files", "measure_curve"]
__getattr__ = lazily(
    __name__, decode_files="files", describe_curve="curve", encode_files="files", measure_curve="curve"
)
