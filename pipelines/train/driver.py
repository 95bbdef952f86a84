"""Ray Train: shards -> checkpoints, by data-parallel training that resumes from its newest checkpoint.

The driver is the only writer to MLflow; worker 0 sends it records through a queue. What a resumed run needs, the records
included, lies in its checkpoints. While MLflow does not answer, the training goes on, and what is for MLflow waits on disk.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from ddpm_core.protocol import fingerprint
from pipelines.runtime.cluster import choose_execution
from pipelines.runtime.progress import Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import open_storage
from pipelines.storage.lease import sole_writer
from pipelines.storage.locations import location
from pipelines.train.checks import check_dataset
from pipelines.train.config import TrainConfig

if TYPE_CHECKING:
    from pipelines.train.session import TrainResult

TRIAL_ENDS = 60.0  # seconds that a trial whose sweep was killed may take to end


def run_name(config: TrainConfig, dataset: ShardedDataset) -> str:
    """The preset and the fingerprint of everything that decides the result of a step."""
    return f"{config.preset}-{fingerprint(config.identity(dataset.sha256))}"


def train(config: TrainConfig, say: Say = lambda line: None, *, parent_run_id: str | None = None) -> "TrainResult":
    """Train, or resume, or find it done.

    Raises InputError for shards, storage or a tracking server that cannot be reached, shards that do not fit the network,
    more workers than the cluster has, a run that another command trains, or a disk that filled up; DivergedError if loss,
    gradient or weights stop being finite, with the last good checkpoint kept; KeyboardInterrupt after a request to stop,
    with the newest step saved.
    """
    storage = open_storage(config.storage, to_write=True)
    dataset = ShardedDataset.open(location(config.shards, option="--shards"))
    check_dataset(config, dataset)
    execution, reason = choose_execution(config.execution, lambda line: say(f"train: {line}"))
    # As a reader elsewhere finds them: a relative path means something in this process's folder alone.
    config = replace(config, execution=execution, storage=str(storage.root), shards=str(dataset.path))
    run = storage.run(run_name(config, dataset))
    # A trial of Tune's outlives the killed driver of its sweep by a moment.
    with sole_writer(run.folder, "run", say, wait=0.0 if parent_run_id is None else TRIAL_ENDS):
        # Here: MLflow takes seconds, in which what is wrong with a command is said.
        from pipelines.train.session import train_alone

        return train_alone(config, reason, dataset, storage, run, say, parent_run_id)
