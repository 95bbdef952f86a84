"""What the sender and the receiver of a coded image compute alike, from the header and the model.

Layout: an image's D values, in a shared random order, lie in blocks of at most 4,096; what a block's path costs then
depends little on where in the image there is much to say. Shared noise comes from ddpm_core.rng and is exact. x_T is
noise: its L_T bits (1e-5 bits/dim) are not sent.

The one thing that two machines may compute differently is the network's output. So the prediction is rounded, in units
of the step's noise, to a grid of 2^-4 (which adds D 2^-8 / 24 nats of KL a step), after the sender has shifted the grid,
by trying shared offsets 0, 1, 2, .., until no value of a block lies within TOLERANCE of an edge. A receiver whose
prediction is off by less than TOLERANCE times the noise rounds alike; one that is off by more fails the next check. This
costs about 2 TOLERANCE n / GRID nats a block; to name the values near an edge would cost 12 bits each.
"""

import math

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ddpm_core import rng
from ddpm_core.codec.format import Header
from ddpm_core.codec.trellis import Trellis, exact_normal
from ddpm_core.diffusion import DenoiseFn, GaussianDiffusion
from ddpm_core.errors import InputError
from ddpm_core.pixel_range import SCALE, scaled_values

BLOCK = 4096
GRID = 2.0**-4
TOLERANCE = 2.0**-18
MOST_SHIFTS = 255
COARSE = 10.0  # 1 costs 4 to 11 % more KL, 100 as much at 10 to 40 steps with the digits' model
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0  # multiples of it lie evenly on a circle, however many
FREQUENCY_BITS = 24  # of the decoder's symbols


def spread_timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    """About `steps` timesteps from 0 to T-1 at even distances of `_capacity`, so that each step has about as much to say.
    Neighbours that fall together are one. Raises InputError unless 2 <= steps <= T."""
    T = diffusion.num_timesteps
    if not 2 <= steps <= T:
        raise InputError(f"steps is {steps}: it must lie in 2..{T}, the model's number of timesteps")
    if steps == T:
        return list(range(T))
    capacity = _capacity(diffusion)
    wanted = torch.linspace(float(capacity[0]), float(capacity[-1]), steps, dtype=torch.float64)
    return sorted({int((capacity - value).abs().argmin()) for value in wanted})


class Chain:
    """A header's chain of steps. Step i, from steps - 1 down to 1, gives x at timestep i - 1; step 0 gives x_0."""

    def __init__(self, diffusion: GaussianDiffusion, denoise_fn: DenoiseFn, header: Header) -> None:
        self.header, self.denoise_fn, self.shape = header, denoise_fn, header.shape
        self.device = diffusion.betas.device
        try:
            self.diffusion = diffusion.strided(spread_timesteps(diffusion, header.steps))
        except ValueError as error:  # of a network that only fits the full chain
            raise InputError(str(error)) from error
        self.steps = self.diffusion.num_timesteps
        self.size = math.prod(self.shape)
        self.blocks = -(-self.size // BLOCK)
        self.width = -(-self.size // self.blocks)
        self.x_T = exact_normal(header.seed, "codec x_T", 0, self.size).to(self.device)
        self._order = rng.permutation(header.seed, "codec order", 0, self.size).to(self.device)
        self._back = torch.argsort(self._order)
        gaps = _capacity(self.diffusion).diff()
        self.growth = [1.0, *(gaps[:-1] / gaps[1:]).tolist(), 1.0]  # of what step i has to say, over step i + 1's
        near = 2.0 * TOLERANCE / GRID * self.width  # values of a block that lie near an edge, on average
        self.shift_chance = max(1, min(65535, round(65536 * math.exp(-near))))

    def trellis(self, i: int) -> Trellis:
        """The candidates of step i."""
        return Trellis(self.header.seed, i, self.blocks, self.width, self.device)

    def posterior(self, i: int) -> tuple[float, float, float]:
        """Step i's (weight of x_0 in units of sigma, weight of x_t, sigma): Eq. 7's mean and beta-tilde."""
        sigma = math.sqrt(float(self.diffusion.posterior_variance[i]))
        x_start, x_t = (float(getattr(self.diffusion, f"posterior_mean_coef{k}")[i]) for k in (1, 2))
        return x_start / sigma, x_t, sigma

    @torch.no_grad()
    def predict(self, x: Float64[Tensor, "b d"], i: int) -> Float64[Tensor, "b d"]:
        """The x_0 predicted from step i's x (Eq. 15), clipped, before any rounding. Raises ValueError if it is not float64."""
        t = torch.full((len(x),), i, device=self.device)
        return self.diffusion.p_mean_variance(self.denoise_fn, x.reshape(-1, *self.shape), t).pred_xstart.flatten(1)

    def to_blocks(self, values: Float64[Tensor, "b d"]) -> Float64[Tensor, "rows width"]:
        """In the shared order, zeros at the end; image j has the rows from j * blocks on."""
        missing = self.blocks * self.width - self.size
        return torch.nn.functional.pad(values[:, self._order], (0, missing)).reshape(-1, self.width)

    def block_of_rows(self, count: int) -> Int[Tensor, " rows"]:
        """Which block each of to_blocks()'s rows is."""
        return torch.arange(count, device=self.device) % self.blocks

    def from_blocks(self, rows: Float64[Tensor, "rows width"]) -> Float64[Tensor, "b d"]:
        """What to_blocks() was given."""
        return rows.reshape(-1, self.blocks * self.width)[:, : self.size][:, self._back]

    def safe_shifts(self, values: Float64[Tensor, "b d"]) -> Int[Tensor, " rows"]:
        """For each block the first shift of the grid under which no value is in danger; the last if there is none."""
        rows = self.to_blocks(values) / GRID
        shifts = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        for _ in range(MOST_SHIFTS):
            distance = (torch.remainder(rows + _offset(shifts), 1.0) - 0.5).abs().amin(1)  # from the nearest edge
            in_danger = distance < TOLERANCE / GRID
            if not bool(in_danger.any()):
                break
            shifts += in_danger
        return shifts

    def rounded(
        self, values: Float64[Tensor, "b d"], shifts: Int[Tensor, " rows"]
    ) -> tuple[Int[Tensor, "rows width"], Float64[Tensor, "b d"]]:
        """(numbers of the grid's points, the values there)."""
        offset = _offset(shifts)
        numbers = torch.floor(self.to_blocks(values) / GRID + offset + 0.5)
        return numbers.to(torch.int32), self.from_blocks((numbers - offset) * GRID)

    def level_frequencies(self, mean: Float64[Tensor, " n"], scale: float) -> Int[Tensor, "n 257"]:
        """Cumulative frequencies of the 256 levels under the discretised decoder (Eq. 13), from 0 to 2^24; each has one."""
        edges = torch.from_numpy(scaled_values()[1:]).to(torch.float64) - 0.5 / SCALE
        cdf = 0.5 * torch.erfc(-math.sqrt(0.5) / scale * (edges - mean.cpu()[:, None]))
        inner = (cdf * ((1 << FREQUENCY_BITS) - 256)).round().to(torch.int64) + torch.arange(1, 256)
        return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=1 << FREQUENCY_BITS)


def _capacity(diffusion: GaussianDiffusion) -> Float64[Tensor, " T"]:
    """log(1 + 10 SNR), of a Gaussian channel and an image whose coarse structure stands out of its pixels' variance."""
    abar = diffusion.alphas_cumprod.cpu()
    return torch.log1p(COARSE * abar / (1.0 - abar))


def _offset(shifts: Tensor) -> Tensor:
    return torch.remainder(shifts[:, None] * GOLDEN, 1.0)
