"""What work on a cluster will take, before it is started."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from pipelines.plan.driver import plan
    from pipelines.plan.page import describe_page

__all__ = ["describe_page", "plan"]
__getattr__ = lazily(__name__, plan="driver", describe_page="page")
