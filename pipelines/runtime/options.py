"""Options that several jobs have: where results lie, and how many workers make them."""

from dataclasses import dataclass

from ddpm_core.ranges import FilePath, Name, Positive, check_ranges


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration whose numbers lie in the ranges that their types say."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class StorageOptions(Checked):
    """Where results lie, and where they are recorded."""

    storage: FilePath = "runs"
    """The folder or URL for checkpoints and results, reachable from every worker."""
    tracking_uri: str | None = None
    """MLflow's; by default MLFLOW_TRACKING_URI, or an SQLite file in the storage folder."""
    experiment: Name = "ddpm"
    """The MLflow experiment."""


@dataclass(frozen=True, kw_only=True)
class PoolOptions(Checked):
    """The workers of a fan-out."""

    workers: Positive[int] | None = None
    """Processes, one a GPU if there are GPUs; as many as the cluster has room for by default."""
    cpus_per_worker: Positive[float] = 0.9
    """CPUs of each."""
