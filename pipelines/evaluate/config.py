"""What an evaluation is, as a value."""

from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from ddpm_core.configs import LATER, EmaLength, Execution, FixedVariance, Method, Mode, Precision, Purpose, Spacing
from ddpm_core.errors import InputError
from ddpm_core.protocol import NEIGHBOURS
from ddpm_core.ranges import Count, FilePath, Name, Positive, Range, Seed
from pipelines.runtime.options import Checked, PoolOptions, StorageOptions

MIN_CHUNKS = 5  # of samples, for an interval
Eta = Annotated[float, Range("a number from 0 to 1", low=0, high=1)]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StorageOptions, PoolOptions):
    """Which checkpoints to evaluate, by which protocol, with how many workers."""

    run: Annotated[FilePath | None, tyro.conf.arg(aliases=["--model"])] = None
    """A training run, by its name, its MLflow run id or its folder; or one checkpoint, by its folder, its MLflow model id or
    models:/NAME@best-fid."""
    checkpoints: Name = "all"
    """Which of the run's: all, latest, or steps such as 1000,2000."""
    weights: FilePath = "ema"
    """ema (averaged, as in the paper), raw (the last ones), or, in place of --run, a folder of weights in the diffusers
    layout, such as google/ddpm-cifar10-32."""
    ema_length: EmaLength | None = field(default=None, metadata=LATER)
    """Of the averaged weights, in place of the training's decay: sigma_rel of Karras et al. 2024, the standard deviation of the
    averaged updates over their number, such as 0.1. For trainings with --optim.posthoc-ema."""
    reference: FilePath | None = None
    """The shards to compare with; the run's own by default."""
    test_reference: FilePath | None = None
    """Shards of the test set, to compare the same samples with besides."""
    extractor: FilePath = "inception"
    """inception (the FID network of 2015-12-05), dinov2 (ViT-L/14, for FD-DINOv2; it has no Inception score), pixels (the image
    averaged to 8x8), or a TorchScript file."""
    samples: Positive[int] = 50_000
    """How many samples; the Frechet distance depends on it."""
    sampler: Method = "ancestral"
    """ancestral (the paper's), ddim, dpmpp_2m, or dpmpp_2m_second_order, whose last step but one is of second order too."""
    sampler_steps: Positive[int] | None = None
    """How many timesteps the sampler visits; all by default."""
    spacing: Spacing = "uniform"
    """How those are spaced: uniform, quadratic (dense where little noise is left, as in the DDIM paper), leading (multiples
    of T // steps, as in its code) or logsnr (even in the log-SNR, for dpmpp_2m)."""
    eta: Eta = field(default=0.0, metadata=LATER)
    """Of ddim: from 0, without noise, to 1, with that of the ancestral chain under fixedsmall."""
    var_type: FixedVariance | None = field(default=None, metadata=LATER)
    """Of the reverse process, sigma^2: fixedlarge (beta_t) or fixedsmall (beta-tilde_t); the run's own by default."""
    mode: Mode = "auto"
    """fast: bfloat16 unless --precision says otherwise, channels-last and torch.compile. exact: what the options say, float32
    by default. auto: fast if the cluster's GPUs multiply in bfloat16, else exact."""
    precision: Precision | None = None
    """Of the network: float32, or bfloat16 for autocast; extractor, process and statistics stay what they are."""
    channels_last: bool = False
    """NHWC storage, for tensor cores."""
    compile: bool = False
    """torch.compile the network: minutes at the start, faster chains after, equal to the last digits but not to the bit."""
    neighbours: Annotated[int, Range("a whole number of 2 or more", low=2)] = field(default=NEIGHBOURS, metadata=LATER)
    """How many samples and reference images KID, precision and recall look at, at most: 50,000 in the paper of precision and
    recall, whose time grows as the square. 50,000 features of Inception take 400 MB, and the driver holds five times that."""
    seed: Seed = 0
    """Of the samples' noise."""
    noise: Purpose = "selection"
    """Of the samples: selection, by which checkpoints are chosen, or report, for what was chosen otherwise."""
    report: bool = True
    """Measure the best of several checkpoints once more, on samples that it was not chosen by."""
    progress: Count[int] = 0
    """At how many points of the chain, from its first step to its last, to measure the predicted x_0 besides (Fig. 10)."""
    pictures: Annotated[int, Range("a number from 0 to 64", low=0, high=64)] = 4
    """Rows of each picture of the best checkpoint: progressive generation, shared latents, interpolations of real images
    (Fig. 6 to 9); 0 for none."""
    nearest: Count[int] = 0
    """For how many samples of the best checkpoint to look up the nearest of all training images, to see whether some are
    memorized; 0 for none."""
    batch_size: Positive[int] = 250
    """Images a network sees at once; float32 results depend on it in the last digits."""
    chunk_size: Positive[int] = 500
    """Samples a file holds, the unit of work and of resuming."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nearest > self.samples:
            raise InputError(f"--nearest is {self.nearest:,} of {self.samples:,} samples: give no more than those")
        if self.samples < 2:
            raise InputError(f"--samples is {self.samples}: a covariance needs 2 or more")
        if self.eta and self.sampler != "ddim":
            raise InputError(f"--eta is {self.eta:g} with --sampler {self.sampler}: it belongs to --sampler ddim")
        if self.ema_length is not None and self.weights != "ema":
            raise InputError(f"--ema-length is {self.ema_length:g} with --weights {self.weights}: it belongs to ema")
        self.check_subject()

    def check_subject(self) -> None:
        """Raises InputError if it is not clear what is to be evaluated."""
        if self.foreign == (self.run is not None):
            raise InputError(
                f"--run is {self.run!r} and --weights {self.weights!r}: give a run, or a folder of weights in its place"
            )

    @property
    def network_precision(self) -> Precision:
        """Float32 unless something else was said or chosen."""
        return self.precision or "float32"

    @property
    def foreign(self) -> bool:
        """Whether the weights come from elsewhere."""
        return self.weights not in ("ema", "raw")

    @property
    def execution(self) -> Execution:
        """How the network is asked to be run."""
        return Execution(
            mode=self.mode, precision=self.precision, channels_last=self.channels_last, compile=self.compile
        )

    def executed(self, chosen: Execution) -> "EvaluateConfig":
        """With what was chosen for `execution`."""
        return replace(
            self,
            mode=chosen.mode,
            precision=chosen.precision,
            channels_last=chosen.channels_last,
            compile=chosen.compile,
        )

    def steps_of(self, num_timesteps: int) -> int:
        """How many of so many timesteps the sampler visits. Raises InputError for more than there are."""
        steps = self.sampler_steps or num_timesteps
        if steps > num_timesteps:
            raise InputError(f"--sampler-steps is {steps}: the run's schedule has {num_timesteps} timesteps")
        return steps


@dataclass(frozen=True, kw_only=True)
class GridConfig(Checked):
    """One checkpoint by DDIM in so many steps with so much noise, as Table 1 of its paper (Song et al. 2021)."""

    evaluate: EvaluateConfig
    """The checkpoint, and all of the protocol but its sampler."""
    steps: tuple[Positive[int], ...] = (10, 20, 50, 100)
    """Of the sampler, one column of the table each."""
    etas: tuple[Eta, ...] = (0.0, 0.2, 0.5, 1.0)
    """DDIM's eta, one row of the table each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steps or not self.etas:
            raise InputError("--steps or --etas is empty: give one value or more of each")

    def cell(self, steps: int, eta: float) -> EvaluateConfig:
        """How one number is measured."""
        sampler = replace(self.evaluate, sampler="ddim", sampler_steps=steps, eta=eta)
        return replace(sampler, report=False, pictures=0, nearest=0, progress=0)


@dataclass(frozen=True, kw_only=True)
class EmaConfig(Checked):
    """One checkpoint with EMA of several lengths."""

    evaluate: EvaluateConfig
    """The checkpoint, and all of the protocol but that length."""
    lengths: tuple[EmaLength, ...] = (0.04, 0.05, 0.075, 0.1, 0.125, 0.15)
    """sigma_rel of each, as --ema-length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths:
            raise InputError("--lengths is empty: give one value or more")

    def of_length(self, length: float) -> EvaluateConfig:
        """How one number is measured."""
        return replace(self.evaluate, ema_length=length, report=False, pictures=0, nearest=0, progress=0)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(Checked):
    """Which real images an extractor is tried on."""

    data: FilePath
    """Shards of a training set, such as CIFAR-10's."""
    test_data: FilePath
    """Shards of its test set."""
    extractor: FilePath = "inception"
    """inception (the FID network of 2015-12-05), dinov2 (ViT-L/14, for FD-DINOv2; it has no Inception score), pixels (the image
    averaged to 8x8), or a TorchScript file."""
    cpus_per_worker: Positive[float] = 0.9
    """CPUs of each worker."""
    storage: FilePath = "runs"
    """Where the outcome is kept; evaluations with the same storage refuse an extractor that failed."""
