"""Every night: what is new is evaluated, the best one gets its alias, and alarms are raised."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.nightly.driver import deliver_alarms, nightly

__all__ = ["deliver_alarms", "nightly"]
__getattr__ = lazily(__name__, deliver_alarms="driver", nightly="driver")
