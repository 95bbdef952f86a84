"""What a report speaks of: the records of one experiment as frozen values, free of MLflow.

A value that was not measured or not recorded is None or empty; one that was measured may be NaN or infinite.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from ddpm_core.protocol import Protocol
from ddpm_core.verdicts import Interval, known_interval


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """One evaluated checkpoint: the Frechet distance with its 95 % interval, and the score, if there is one, with its standard
    deviation over splits and its 95 % interval, which earlier versions did not log."""

    step: int
    distance: float
    low: float | None = None
    high: float | None = None
    score: float | None = None
    score_std: float | None = None
    score_low: float | None = None
    score_high: float | None = None

    @property
    def interval(self) -> Interval | None:
        """Both ends, None unless they are finite numbers."""
        return known_interval(self.low, self.high)

    @property
    def score_interval(self) -> Interval | None:
        """The same of the score."""
        return known_interval(self.score_low, self.score_high)


@dataclass(frozen=True, kw_only=True)
class GridLayout:
    """How a grid of images is laid out: `columns` tiles a row, each `tile` = (height, width) pixels, no gaps. `indices` and
    `seed` say which samples they are, if they are samples."""

    tile: tuple[int, int]
    columns: int
    count: int
    indices: str = ""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The checkpoints of one training that were measured under one protocol, by ascending step.

    started: in ms, when its MLflow run was made. samples: step -> artifact path of its grid. metrics: the names of all that
    was logged. alarm: what the nightly evaluation warns of, in a sentence.
    """

    run_id: str
    status: str
    protocol: Protocol
    started: int = 0
    checkpoints: tuple[CheckpointRecord, ...] = ()
    layout: GridLayout | None = None
    samples: Mapping[int, str] = field(default_factory=dict)
    metrics: frozenset[str] = frozenset()
    alarm: str = ""


@dataclass(frozen=True, kw_only=True)
class RateDistortionCurves:
    """Fig. 5 of the paper over its t = 1..T: what having x_t costs in bits/dim, and the RMSE of the x_0 predicted from it
    on 0..255."""

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
    """The variational bound of one checkpoint in bits/dim: the whole with its 95 % interval, the rate L_1 + .. + L_T, the
    distortion L_0, L_T, and the RMSE of L_0's reconstruction on 0..255. `curves` if every term was evaluated."""

    step: int
    bpd: float
    low: float | None = None
    high: float | None = None
    rate: float | None = None
    distortion: float | None = None
    prior: float | None = None
    rmse: float | None = None
    curves: RateDistortionCurves | None = None


@dataclass(frozen=True, kw_only=True)
class LikelihoodRecord:
    """The checkpoints of one training measured on the same images, by ascending step. `strata` is None for the full bound,
    else the number of drawn terms of an estimate."""

    run_id: str
    fingerprint: str
    data: str
    data_sha256: str
    images: int
    strata: int | None
    weights: str
    results: tuple[BitsPerDim, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CompressionRecord:
    """Coded files of some images: points (bits/dim, RMSE on 0..255) of files cut short, of the theory and of other formats;
    `lossless` bits/dim by format, the codec's own as "coded"; `bound` in bits/dim, and by which fraction the lossy part of
    the files is above its own."""

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
    lossy_overhead: float


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
    """The training set. `mean`, `std` and `second_moment` are of pixels in [-1, 1]."""

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
class RunRecord:
    """A training and what was measured of its checkpoints. `latest` holds the last value of each metric; `sheet` is the
    layout of the data's contact sheet. Weights from elsewhere that were measured are a run without a training: `foreign`."""

    run_id: str
    name: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    latest: Mapping[str, float]
    card: DataCard | None = None
    sheet: GridLayout | None = None
    evaluations: tuple[EvaluationRecord, ...] = ()
    likelihoods: tuple[LikelihoodRecord, ...] = ()
    compressions: tuple[CompressionRecord, ...] = ()
    foreign: bool = False

    @property
    def batch_size(self) -> int | None:
        """Images a step over all workers."""
        text = self.params.get("optim.batch_size", "")
        return int(text) if text.isdecimal() else None

    def images_seen(self, step: int) -> int | None:
        """Images that the training has drawn up to a step, repetitions among them."""
        return None if self.batch_size is None else step * self.batch_size


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
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
class ScheduleCurves:
    """A noise schedule at some of its timesteps, as the sweep recorded them."""

    t: tuple[float, ...]
    betas: tuple[float, ...]
    alphas_cumprod: tuple[float, ...]
    log_snr: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A sweep, with the conclusion that it came to itself, in words."""

    run_id: str
    name: str
    conclusion: str = ""
    trials: tuple[TrialRecord, ...] = ()
    schedules: Mapping[str, ScheduleCurves] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExperimentRecord:
    """Everything the report says, except what is drawn.

    runs, sweeps: the oldest first. remarks: sentences on records that could not be used. updated: when the last run started
    or ended. only: the run or sweep that the records are limited to.
    """

    name: str
    experiment_id: str
    tracking_uri: str
    runs: tuple[RunRecord, ...]
    sweeps: tuple[SweepRecord, ...] = ()
    remarks: tuple[str, ...] = ()
    updated: datetime | None = None
    only: str | None = None
