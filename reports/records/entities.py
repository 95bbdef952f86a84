"""What a report speaks of: the records of one experiment as frozen values, free of MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from ddpm_core.protocol import Protocol
from ddpm_core.verdicts import Interval, known_interval


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One evaluated checkpoint: the Frechet distance with its 95 % interval, and the score if there is one.
    Values may be NaN or infinite; None means not measured."""

    step: int
    distance: float
    low: float | None = None
    high: float | None = None
    score: float | None = None
    score_std: float | None = None

    @property
    def interval(self) -> Interval | None:
        """Both ends, None unless they are finite numbers."""
        return known_interval(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class GridLayout:
    """How a grid of images is laid out: `columns` tiles a row, each `tile` = (height, width) pixels, no gaps;
    `indices` and `seed` say which samples they are, where they are samples."""

    tile: tuple[int, int]
    columns: int
    count: int
    indices: str = ""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All checkpoints of one training run measured under one protocol."""

    run_id: str
    status: str
    protocol: Protocol
    checkpoints: tuple[Checkpoint, ...] = ()
    layout: GridLayout | None = None
    samples: Mapping[int, str] = field(default_factory=dict)  # step -> artifact path of its grid
    metrics: frozenset[str] = frozenset()  # the names of all that was logged
    alarm: str = ""  # what the nightly evaluation warns of, in a sentence


@dataclass(frozen=True, kw_only=True)
class RateDistortion:
    """Fig. 5 over the paper's t = 1..T: what having x_t costs in bits/dim, and the RMSE of the x_0 predicted from it on
    0..255."""

    t: tuple[int, ...]
    rate: tuple[float, ...]
    rmse: tuple[float, ...]

    @property
    def num_timesteps(self) -> int:
        return len(self.t)

    def after(self, steps: int) -> tuple[float, float]:
        """(rate, RMSE) after `steps` = T - t + 1 steps were sent: a row of Table 4."""
        place = self.t.index(self.num_timesteps - steps + 1)
        return self.rate[place], self.rmse[place]


@dataclass(frozen=True, kw_only=True)
class BitsPerDim:
    """The variational bound of one checkpoint in bits/dim: its whole with a 95 % interval, the rate L_1 + .. + L_T, the
    distortion L_0, L_T, and the RMSE of L_0's reconstruction on 0..255. `curves` where every term was evaluated."""

    step: int
    bpd: float
    low: float | None = None
    high: float | None = None
    rate: float | None = None
    distortion: float | None = None
    prior: float | None = None
    rmse: float | None = None
    curves: RateDistortion | None = None


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The checkpoints of one training run measured on the same images. `strata` is None for the full bound, else the
    number of drawn terms of an estimate."""

    run_id: str
    fingerprint: str
    data: str
    data_sha256: str
    images: int
    strata: int | None
    weights: str
    results: tuple[BitsPerDim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Coded files of some images: points (bits/dim, RMSE on 0..255) of the files cut, of the theory and of other formats;
    `lossless` bits/dim by format, the codec's own as "coded"; `overhead` over the bound, of the lossy part and in total."""

    fingerprint: str
    step: int
    data: str
    images: int
    steps: int
    coded: tuple[tuple[float, float], ...]
    theory: tuple[tuple[float, float], ...]
    others: Mapping[str, tuple[tuple[float, float], ...]]
    lossless: Mapping[str, float]
    bound: float
    overhead: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PictureGrid:
    """A picture of what a checkpoint does: `rows` x `columns` tiles of `tile` = (height, width) pixels without gaps."""

    kind: str
    path: str
    tile: tuple[int, int]
    rows: int
    columns: int
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    caption: str


@dataclass(frozen=True, kw_only=True)
class NeighboursFacts:
    """How many samples were looked up among how many training images, and by which rule one counts as a copy: its nearest
    distance is below `threshold` times the mean of the `nearest` ones."""

    samples: int
    training_images: int
    threshold: float
    nearest: int


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """The training set. `mean`, `std` and `second_moment` are of pixels in [-1, 1]; None means not
    recorded."""

    name: str
    images: int | None = None
    shape: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    second_moment: float | None = None
    source: str | None = None
    sha256: str | None = None
    filter: str | None = None
    skipped: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training run and what was measured of it. `latest` holds the last value of each metric. Weights from elsewhere
    that were evaluated are a run without a training: `foreign`."""

    run_id: str
    name: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    latest: Mapping[str, float]
    card: DataCard | None = None
    sheet: GridLayout | None = None  # of the contact sheet
    evaluations: tuple[Evaluation, ...] = ()
    likelihoods: tuple[Likelihood, ...] = ()
    compressions: tuple[Compression, ...] = ()
    foreign: bool = False

    @property
    def batch_size(self) -> int | None:
        """Images a step over all workers."""
        text = self.params.get("optim.batch_size", "")
        return int(text) if text.isdecimal() else None

    def images_seen(self, step: int) -> int | None:
        return None if self.batch_size is None else step * self.batch_size


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A point of a sweep, that is, one setting, with one seed; its label names both. `prior_bpd` is L_T in bits/dim, the
    part of the bound that no training lowers. `reason` says why it did not finish."""

    label: str
    point: str
    run_id: str | None
    evaluation_run_id: str | None
    steps: int | None
    status: str
    prior_bpd: float | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A noise schedule at some of its timesteps, as the sweep recorded them."""

    t: tuple[float, ...]
    betas: tuple[float, ...]
    alphas_cumprod: tuple[float, ...]
    log_snr: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    run_id: str
    name: str
    status: str
    conclusion: str = ""  # the sweep's own
    trials: tuple[Trial, ...] = ()
    schedules: Mapping[str, Schedule] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExperimentRecord:
    """Everything the report says, except what is drawn. `remarks` are sentences on records that could not be
    used; `updated` is when the last run started or ended; `only` is the run or sweep that the records are kept to."""

    name: str
    experiment_id: str
    tracking_uri: str
    runs: tuple[TrainingRun, ...]
    sweeps: tuple[Sweep, ...] = ()
    remarks: tuple[str, ...] = ()
    updated: datetime | None = None
    only: str | None = None
