"""What a person chooses of a model, as frozen values: network, process, optimiser, execution, and every named choice.

Importable without torch, so that a command line can be read, checked and explained at once. Each class is listed again by
the module whose object it describes: `from ddpm_core.unet import UNet, UNetConfig`.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from ddpm_core.ranges import Count, Fraction, Positive, Range, Variance, check_ranges, up_to

if TYPE_CHECKING:
    import torch

    import ddpm_core.diffusion

Schedule = Literal["linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine"]
MeanType = Literal["eps", "xstart", "xprev", "v"]
VarType = Literal["fixedlarge", "fixedsmall", "learned", "learned_range"]
LossType = Literal["mse", "kl", "hybrid"]
EmaStart = Literal["copy", "initial", "warmup"]
Precision = Literal["float32", "bfloat16"]
Mode = Literal["auto", "exact", "fast"]  # of execution: fast on GPUs that multiply in bfloat16, as options say, or fast
Weights = Literal["ema", "raw"]  # averaged, as in the paper, or the last ones
FixedVariance = Literal["fixedlarge", "fixedsmall"]  # what a network without a learned variance may be sampled with
Method = Literal["ancestral", "ddim", "dpmpp_2m", "dpmpp_2m_second_order"]  # of sampling
Spacing = Literal["uniform", "quadratic", "leading", "logsnr"]  # of the timesteps that a sampler visits
Cdf = Literal["exact", "tanh"]  # of the decoder's normal distribution; tanh is the approximation of Ho's code
Purpose = Literal["selection", "report"]  # of an evaluation's noise: to choose a checkpoint, or to report its numbers
Split = Literal["train", "test"]  # what a reference set is to the run

# Of power-function averages, sigma_rel: what may be asked for, and the two that are tracked (Karras et al. 2024, section 3.2).
EmaLength = Annotated[float, Range("a number from 0.01 to 0.28", low=0.01, high=0.28)]
TRACKED_LENGTHS = (0.05, 0.10)

CODEC_STEPS = 50  # of the timesteps that a coded file visits
LEARNED: tuple[VarType, ...] = ("learned", "learned_range")
WITHOUT_ENDS: tuple[Schedule, ...] = ("jsd", "cosine")  # num_timesteps alone decides them


LATER = {"later": True}  # metadata of a dataclass's field: a choice that there was not at first


def identity(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that name it. Those of LATER that have their default are left out, so that what was named
    before there was a choice keeps its name."""
    later = {each.name: each.default for each in fields(value) if each.metadata.get("later")}
    return {name: plain for name, plain in asdict(value).items() if name not in later or plain != later[name]}


def later_choices(value: Any) -> dict[str, Any]:
    """The fields of LATER that do not have their default."""
    later = {each.name for each in fields(value) if each.metadata.get("later")}
    return {name: plain for name, plain in identity(value).items() if name in later}


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises ValueError unless `value` is among the values of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(get_args(choices))}")


def check_schedule(schedule: Schedule, num_timesteps: int, beta_start: float, beta_end: float) -> None:
    """Raises ValueError unless a schedule of this name and these ends consists of variances in (0, 1]."""
    check_choice("schedule", schedule, Schedule)
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps is {num_timesteps}: it must be 1 or more")
    if not 0.0 < beta_end <= 1.0 or not 0.0 < beta_start <= 1.0:
        raise ValueError(f"beta_start, beta_end are {beta_start}, {beta_end}: both must lie in (0, 1]")


def check_objective(mean_type: MeanType, var_type: VarType, loss_type: LossType) -> None:
    """Raises ValueError unless the loss trains what the network predicts."""
    check_choice("mean_type", mean_type, MeanType)
    check_choice("var_type", var_type, VarType)
    check_choice("loss_type", loss_type, LossType)
    if loss_type == "mse" and var_type in LEARNED:
        raise ValueError(
            f"loss_type is 'mse' and var_type is {var_type!r}: the mean squared error does not train a variance; "
            "take loss_type 'kl' or 'hybrid', or a fixed variance"
        )
    if loss_type == "hybrid" and var_type not in LEARNED:
        raise ValueError(
            f"loss_type is 'hybrid' and var_type is {var_type!r}: the hybrid loss adds a term for a learned variance; "
            "take var_type 'learned' or 'learned_range', or loss_type 'mse'"
        )


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A U-Net by its values. Level l works at image_size / 2^l with ch * ch_mult[l] channels."""

    image_size: Annotated[int, up_to(4096)]
    """Height and width of the images."""
    in_channels: Annotated[int, up_to(64)] = 3
    """Channels of the images."""
    out_channels: Annotated[int, up_to(128)] | None = None
    """Channels of the output: as many as in_channels by default, twice that for a learned variance."""
    ch: Annotated[int, up_to(4096)] = 128
    """Channels at full resolution."""
    ch_mult: tuple[Annotated[int, up_to(64)], ...] = (1, 2, 2, 2)
    """Each level's channels in units of ch; a level halves the resolution."""
    num_res_blocks: Annotated[int, up_to(64)] = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attn_resolutions: tuple[Positive[int], ...] = (16,)
    """Resolutions with self-attention."""
    dropout: Fraction = 0.0
    """Inside each residual block."""

    def __post_init__(self) -> None:
        check_ranges(self, options=False)
        if self.ch % 32:
            raise ValueError(f"ch is {self.ch}: it must be a multiple of 32, for group norm's 32 groups")
        if not self.ch_mult:
            raise ValueError(f"ch_mult is {self.ch_mult}: it must hold one positive factor a level")
        factor = 2 ** (len(self.ch_mult) - 1)
        if self.image_size < factor or self.image_size % factor:
            raise ValueError(
                f"image_size is {self.image_size}: {len(self.ch_mult)} levels halve it {len(self.ch_mult) - 1} times, "
                f"so it must be a multiple of {factor}"
            )

    @property
    def dropout_layers(self) -> int:
        """How many keys an image needs for its dropout: one a residual block, 0 if nothing is dropped."""
        return len(self.ch_mult) * (2 * self.num_res_blocks + 1) + 2 if self.dropout else 0


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """A diffusion process by its values."""

    schedule: Schedule = "linear"
    """How beta_1..beta_T run."""
    num_timesteps: Annotated[int, up_to(1_000_000)] = 1000
    """T."""
    beta_start: Variance = 1e-4
    """beta_1, for the schedules that have one."""
    beta_end: Variance = 0.02
    """beta_T, for the schedules that have one."""
    mean_type: MeanType = "eps"
    """What the network predicts."""
    var_type: VarType = "fixedlarge"
    """The reverse process's variance."""
    loss_type: LossType = "mse"
    """L_simple, a term of the bound, or both."""
    cdf: Cdf = field(default="exact", metadata=LATER)
    """Of the decoder's normal distribution in a loss that has the bound: exact, or tanh for the approximation of the paper's
    code, whose first gradients differ by some percent."""

    def __post_init__(self) -> None:
        check_ranges(self, options=False)
        check_schedule(self.schedule, self.num_timesteps, self.beta_start, self.beta_end)
        check_objective(self.mean_type, self.var_type, self.loss_type)
        check_choice("cdf", self.cdf, Cdf)

    def betas(self) -> "torch.Tensor":
        """beta_1..beta_T, float64 [T]."""
        from ddpm_core.schedules import make_betas

        return make_betas(self.schedule, self.num_timesteps, self.beta_start, self.beta_end)

    def build(self) -> "ddpm_core.diffusion.GaussianDiffusion":
        """The process itself, on the CPU."""
        from ddpm_core.diffusion import GaussianDiffusion

        return GaussianDiffusion(
            self.betas(), mean_type=self.mean_type, var_type=self.var_type, loss_type=self.loss_type, cdf=self.cdf
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser: Adam without weight decay, linear warm-up from 0, a clip of the gradient's norm, EMA."""

    batch_size: Positive[int] = 128
    """Images a step over all workers."""
    lr: Positive[float] = 2e-4
    """Learning rate after the warm-up."""
    warmup_steps: Count[int] = 5000
    """Steps over which the learning rate rises from 0."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam's decay of the first and second moment."""
    adam_eps: Positive[float] = 1e-8
    """Adam's epsilon."""
    adam_eps_hat: bool = False
    """Add epsilon before the bias correction ("epsilon hat"), as TensorFlow's Adam and so the paper's code, not after it,
    as Adam's Algorithm 1 and PyTorch; with 1e-8 they differ in the first steps alone."""
    grad_clip: Positive[float] = 1.0
    """Largest norm of the gradient."""
    clip_replicas: Positive[int] = 1
    """In how many equal parts the batch's gradient is clipped before they are averaged. 1 clips the gradient of the whole
    batch; the paper's code clips on each TPU core before the all-reduce, which is 8."""
    ema_decay: Fraction = 0.9999
    """Of the averaged weights."""
    ema_start: EmaStart = "copy"
    """EMA's first update copies the weights (the paper's code), or averages from the initial ones at once, or warms the
    decay up."""
    posthoc_ema: bool = field(default=False, metadata=LATER)
    """Track two averages more, of power functions, from which evaluation makes an EMA of any length (--ema-length). They cost
    two copies of the weights in memory and in each checkpoint, and stay when that is deleted."""

    def __post_init__(self) -> None:
        check_ranges(self, options=False)
        if self.batch_size % self.clip_replicas:
            raise ValueError(
                f"clip_replicas is {self.clip_replicas} for a batch of {self.batch_size}: it must divide the batch"
            )

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`, counted from 0: as in Ho's code, the first of a warm-up is 0."""
        return self.lr * min(step / self.warmup_steps, 1.0) if self.warmup_steps else self.lr

    def epsilon(self, step: int) -> float:
        """What PyTorch's Adam is to add in update number `step`: epsilon-hat over the root of the bias correction."""
        return self.adam_eps / (1.0 - self.adam_betas[1] ** (step + 1)) ** 0.5 if self.adam_eps_hat else self.adam_eps

    def identity(self) -> dict[str, Any]:
        """The values that name a run. Alternatives that came later and are not taken are left out, so that a run made
        before there was a choice keeps its name."""
        alternatives = {"adam_eps_hat": False, "clip_replicas": 1, "ema_start": "copy"}
        return {name: value for name, value in identity(self).items() if alternatives.get(name) != value}


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a step is carried out. `precision` changes what is computed and belongs to a run's identity; the other values
    change the order and the rounding of sums alone."""

    mode: Mode = "auto"
    """fast: bfloat16 unless --execution.precision says otherwise, channels-last and torch.compile. exact: what the options
    say, float32 by default. auto: fast if the cluster's GPUs multiply in bfloat16, else exact."""
    precision: Precision | None = None
    """Of the network's convolutions and products. Weights, norms, loss, gradients, Adam and EMA are float32 with both; on
    a GPU, float32 convolutions multiply in TF32, as PyTorch's default is."""
    micro_batch: Positive[int] | None = None
    """Most images at once: a worker's share is cut into parts of so many, whose gradients add up; by default as many as fit
    its GPU. Best a divisor of the share."""
    activation_checkpointing: bool = False
    """Keep each layer's input alone for the backward pass: far less memory for a third more work."""
    channels_last: bool = False
    """NHWC storage, for tensor cores."""
    compile: bool = False
    """torch.compile the network: minutes at the start, fewer and larger kernels after."""
    deterministic: bool = False
    """On GPUs, only kernels that add up in a fixed order, chosen without timing them, which costs some speed: a killed and
    resumed training then equals an undisturbed one bit for bit, on the same kind and number of GPUs, with the same versions
    and micro-batch. Without it, it does so on CPUs."""
    fused_adam: bool | None = None
    """Adam as one kernel, by default on CPUs and GPUs; without it, it reads single numbers back, and rounds otherwise."""

    def __post_init__(self) -> None:
        check_ranges(self, options=False)

    @property
    def network_precision(self) -> Precision:
        """Float32 unless something else was said or chosen."""
        return self.precision or "float32"

    def resolved(self, *, fast: bool) -> "Execution":
        """With every choice made: as in mode fast, or as the options say. Stays what it is if it is resolved again."""
        return replace(
            self,
            mode="exact",
            precision=self.precision or ("bfloat16" if fast else "float32"),
            channels_last=self.channels_last or fast,
            compile=self.compile or fast,
        )

    def identity(self) -> dict[str, Any]:
        """The values that name a run: none if all is float32."""
        return {} if self.network_precision == "float32" else {"precision": self.network_precision}
