"""The options of a likelihood measurement."""

from dataclasses import dataclass

from ddpm_core.configs import Cdf, FixedVariance, Weights
from ddpm_core.ranges import FilePath, Name, Positive, Seed
from pipelines.runtime.options import PoolOptions, StorageOptions


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(StorageOptions, PoolOptions):
    """Which checkpoints to measure, on which images, how exactly, and with how many workers."""

    run: FilePath
    """A training run, by its name, its MLflow run id or its folder; or the folder of one checkpoint."""
    checkpoints: Name = "latest"
    """Which of the run's: all, latest, or steps such as 1000,2000."""
    data: FilePath | None = None
    """The shards whose images are coded; the run's own by default."""
    images: Positive[int] | None = None
    """How many of them, 5 or more: the first of a permutation that the seed decides; all by default."""
    strata: Positive[int] | None = None
    """By default every term of the bound, T network passes an image. With a number, L_0 and so many other terms, drawn one
    from each stratum of t: an estimate without bias, whose error the interval covers; 32 are good for T = 1000."""
    weights: Weights = "ema"
    """Averaged weights, as in the paper, or the last ones."""
    cdf: Cdf = "exact"
    """The normal CDF of the decoder L_0: exact, or tanh for the authors' approximation."""
    var_type: FixedVariance | None = None
    """Of the reverse process, sigma^2: fixedlarge (beta_t) or fixedsmall (beta-tilde_t); the run's own by default."""
    seed: Seed = 0
    """Decides the choice of images, the noise and the drawn terms."""
    batch_size: Positive[int] = 100
    """Images a network sees at once; float32 results depend on it in the last digits."""
    chunk_size: Positive[int] = 100
    """Images a file holds, the unit of work and of resuming; rounded up to whole batches."""
