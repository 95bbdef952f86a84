"""What is shown of a checkpoint besides its numbers: pictures of what it does on the way, and the nearest training images."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.evaluate.illustrate.driver import illustrate

__all__ = ["illustrate"]
__getattr__ = lazily(__name__, illustrate="driver")
