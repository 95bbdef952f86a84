"""MLflow records to one HTML file."""

from typing import TYPE_CHECKING

from ddpm_core.exports import lazily

if TYPE_CHECKING:
    from reports.build import build_report

__all__ = ["build_report"]
__getattr__ = lazily(__name__, build_report="build")
