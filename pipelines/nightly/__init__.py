"""Every night: what is new is evaluated, the best one gets its alias, a person is told what got worse."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.nightly.night import delivered, nightly

__all__ = ["delivered", "nightly"]
__getattr__ = lazily(__name__, delivered="night", nightly="night")
