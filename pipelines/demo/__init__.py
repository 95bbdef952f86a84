"""The whole workflow at laptop size."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.demo.driver import demo

__all__ = ["demo"]
__getattr__ = lazily(__name__, demo="driver")
