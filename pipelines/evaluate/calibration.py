"""Known answers: what an extractor and the metrics must say of real images before they are believed of samples.

With the 2015-12-05 network and CIFAR-10 they are published numbers; with any network the distance of a set from itself is
0. The distance between random halves stands beside them, for a person to look at.
"""

from dataclasses import asdict, dataclass

from typing_extensions import TypedDict

from ddpm_core import typed
from ddpm_core.errors import InputError
from ddpm_core.protocol import INCEPTION, metric_name
from pipelines.evaluate.config import CalibrateConfig
from pipelines.evaluate.extractor import Extractor, describe_extractor
from pipelines.runtime.fan_out import Pool
from pipelines.runtime.progress import Say
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.layout import Storage, open_storage
from pipelines.storage.locations import Location, commit_json, location

# Published of CIFAR-10: FID of the training from the test set, and the training set's Inception score. Tolerance: their
# last digit.
CIFAR10 = {"fid": 3.15, "is": 11.24}
LAST_DIGIT = 0.01
ZERO = 1e-3  # of a distance of equal moments: eigenvalues of a singular covariance are good to 1e-8 of the largest


class CalibrationOutcome(TypedDict):
    """What is read of an extractor's calibration."""

    passed: bool


@dataclass(frozen=True)
class Check:
    """A number with what it must be, None if it is only to be looked at."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def passed(self) -> bool:
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    def describe(self) -> str:
        if self.low is None and self.high is None:
            return f"{self.name} is {self.value:.4f}"
        wanted = f"{'' if self.low is None else f'{self.low:g}'}..{'' if self.high is None else f'{self.high:g}'}"
        return f"{self.name} is {self.value:.4f}, wanted {wanted}: {'passed' if self.passed else 'FAILED'}"


def calibrate(config: CalibrateConfig, say: Say = lambda line: None) -> tuple[Check, ...]:
    """Measure real images and compare with what is known. Raises InputError if a check fails, after all are said and kept."""
    # Here: evaluations look up what it said, without measuring.
    from ddpm_core.metrics.frechet import frechet_distance
    from pipelines.evaluate.reference import reference_statistics

    storage = open_storage(config.storage, to_write=True)
    train, test = (
        ShardedDataset.open(location(given, option=option))
        for given, option in ((config.data, "--data"), (config.test_data, "--test-data"))
    )
    if train.shape != test.shape:
        raise InputError(
            f"--data holds images {'x'.join(map(str, train.shape))} and --test-data {'x'.join(map(str, test.shape))}: give "
            "two parts of one data set"
        )
    extractor = describe_extractor(config.extractor, train)
    with Pool(None, config.cpus_per_worker, say) as pool:
        of_train, of_test = (reference_statistics(dataset, extractor, pool) for dataset in (train, test))
    name = metric_name("fd", extractor.name)
    whole = of_train.statistics.moments()
    halves = frechet_distance(*of_train.halves[0].moments(), *of_train.halves[1].moments())
    across = frechet_distance(*whole, *of_test.statistics.moments())
    published = extractor.name == INCEPTION and train.name.startswith("cifar10") and len(train) == 50_000
    within = (CIFAR10["fid"] - LAST_DIGIT, CIFAR10["fid"] + LAST_DIGIT) if published else (None, None)
    checks = [
        Check(f"{name}(train, train)", frechet_distance(*whole, *whole), 0.0, ZERO),
        Check(f"{name}(half of train, other half)", halves),
        Check(f"{name}(train, test)", across, *within),
    ]
    if of_train.score is not None:
        within = (
            (CIFAR10["is"] - LAST_DIGIT, CIFAR10["is"] + LAST_DIGIT)
            if published
            else (1.0, float(extractor.num_logits or 1))
        )
        checks.append(Check(f"{metric_name('is', extractor.name)}(train)", of_train.score[0], *within))
    passed = all(check.passed for check in checks)
    facts = {"extractor_sha256": extractor.sha256, "passed": passed, "checks": [asdict(check) for check in checks]}
    commit_json(outcome_path(storage, extractor), facts)
    for check in checks:
        say(f"calibrate: {check.describe()}")
    if not passed:
        failed = next(check for check in checks if not check.passed)
        raise InputError(
            f"extractor {extractor.name} (sha256 {extractor.sha256[:12]}) failed its calibration ({failed.describe()}): its "
            "numbers are not used until it passes; look at the data sets' filters and the weights"
        )
    return tuple(checks)


def outcome_path(storage: Storage, extractor: Extractor) -> Location:
    return storage.calibration(f"{extractor.name}-{extractor.sha256[:12]}")


def check_calibrated(extractor: Extractor, storage: Storage) -> None:
    """Raises InputError if this extractor was calibrated with this storage, and failed or left a damaged file."""
    path = outcome_path(storage, extractor)
    try:
        advice = "delete it, or run jobs/evaluate.py calibrate again"
        passed = typed.read_json(path, CalibrationOutcome, what="calibration", advice=advice)["passed"]
    except (FileNotFoundError, NotADirectoryError):
        return
    if not passed:
        raise InputError(
            f"extractor {extractor.name} failed its calibration ({str(path)!r}): run jobs/evaluate.py calibrate again until "
            "it passes, or take another"
        )
