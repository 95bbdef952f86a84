"""What each training worker runs: the steps, the records and the checkpoints."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import ray.train
import ray.train.torch
import ray.util.queue
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from ddpm_core import images, rng
from ddpm_core.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from ddpm_core.configs import Execution
from ddpm_core.costs import fit_micro_batch
from ddpm_core.diffusion import GaussianDiffusion
from ddpm_core.png import encode_png, tile
from ddpm_core.precision import compute_deterministically
from ddpm_core.records import GRAD_NORM, LOSS
from ddpm_core.samplers import sample
from ddpm_core.training import TrainState, train_step
from ddpm_core.unet import UNet
from pipelines.checkpoints.saver import Saver
from pipelines.checkpoints.store import newest_checkpoint
from pipelines.shards.dataset import ShardedDataset
from pipelines.storage.locations import Location
from pipelines.train.checks import check_shuffle
from pipelines.train.config import TrainConfig
from pipelines.train.loader import Loader
from pipelines.train.meter import OPEN, Meter

BEAT = 10  # steps between looks for a request to stop and for a node that is about to go
GRID, GRID_STEPS, GRID_COLUMNS = 64, 50, 8  # samples shown while the training goes on, by DDIM


@dataclass(frozen=True)
class WorkerTask:
    """What the driver hands to every worker."""

    config: TrainConfig
    dataset: ShardedDataset
    folder: Location  # of the run's checkpoints
    outbox: ray.util.queue.Queue  # rank 0's messages to the driver
    stop: ray.util.queue.Queue  # holds something when the driver wants the training to save and end


def initial_state(config: TrainConfig, execution: Execution | None = None) -> TrainState:
    """The state before the first step: weights from the seed, drawn on the CPU, the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive_seed(config.seed, "weights"))
        model = UNet(config.unet)
    return TrainState(model, config.optim, execution or config.execution)


def run_worker(arguments: dict[str, Any]) -> None:
    """Train from the newest checkpoint to the last step. Runs in each of Ray Train's workers."""
    task: WorkerTask = arguments["task"]
    context = ray.train.get_context()
    worker = Worker(task, context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    worker.train()


class Worker:
    """One of the data-parallel processes; all make the same steps, and rank 0 speaks for them."""

    def __init__(self, task: WorkerTask, rank: int, world_size: int, device: torch.device) -> None:
        self.task, self.config = task, task.config
        self.rank, self.world_size, self.device = rank, world_size, device
        execution = self.config.execution
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # one shape, a million times
            capacity = torch.cuda.get_device_properties(device).total_memory
            execution = fit_micro_batch(self.config.unet, self.config.optim, execution, world_size, capacity)
        if execution.deterministic:
            compute_deterministically()
        self.state = initial_state(self.config, execution)
        self.state.to(device)
        self.history: list[dict[str, Any]] = []  # the run's records, from its first step
        self.meter = Meter(self.config, device, world_size)
        self.saver = Saver(task.folder, keep_last=self.config.keep_last, keep_every=self.config.keep_every)
        checkpoint = self.agreed_checkpoint()
        if checkpoint is not None:
            checkpoint.restore(self.state)
            self.history = list(checkpoint.history)
            if self.history and OPEN in self.history[-1]:
                self.meter.resume(self.history.pop()[OPEN], rank)
        self.unreported: list[int] = []  # steps of checkpoints being written, which the driver does not know of
        self.notice: object = None  # of a node about to go, which a checkpoint was made for

    def agreed_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from: rank 0's newest, for others may see the folder a moment later or earlier."""
        newest = newest_checkpoint(self.task.folder, self.config.steps)
        step = torch.tensor(-1 if newest is None else newest.step, device=self.device)
        if self.world_size > 1:
            torch.distributed.broadcast(step, 0)
        if step < 0:
            return None
        return open_checkpoint(self.task.folder / checkpoint_name(int(step)))

    def train(self) -> None:
        config, state = self.config, self.state
        check_shuffle(config, self.task.dataset)
        diffusion = config.diffusion.build().to(self.device)
        denoise_fn: torch.nn.Module = state.model
        if self.world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            denoise_fn = DistributedDataParallel(state.model, device_ids=devices, gradient_as_bucket_view=True)
        denoise_fn.train()
        peak = None if self.meter.peak is None else self.meter.peak.describe()
        self.send(
            "start",
            step=state.step,
            workers=self.world_size,
            peak=peak,
            micro_batch=state.execution.micro_batch,
        )
        loader = Loader(
            config,
            self.task.dataset,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            first_step=state.step,
        )
        with loader, self.saver:
            for batch in loader:
                metrics = train_step(
                    state, diffusion, denoise_fn, config.optim, **batch._asdict(), world_size=self.world_size
                )
                self.meter.add(metrics)
                if self.after_step(loader, diffusion):
                    break
        self.report_saved()

    def after_step(self, loader: Loader, diffusion: GaussianDiffusion) -> bool:
        """Record, look around, save and show samples, if it is time; whether to end here."""
        config, state, step = self.config, self.state, self.state.step
        self.report_saved()
        last = step == config.steps
        stop, lost = self.beat() if step % BEAT == 0 else (False, False)
        log, save = step % config.log_every == 0 or last, step % config.checkpoint_every == 0 or last or stop or lost
        if (log or save) and self.diverged():
            return True
        if log:
            self.history.append(self.meter.close(state, loader.seconds_waited))
            self.send("record", record=self.history[-1])
        if save:
            still_open = self.meter.open_sums()
            if self.rank == 0:
                self.saver.save(state, asdict(config), [*self.history, *still_open])
                self.unreported.append(step)
        if config.sample_every and step % config.sample_every == 0 and self.rank == 0:
            self.send("samples", step=step, png=sample_grid(config, state, diffusion, self.device))
        if stop:
            self.send("stopped", step=step)
        return stop

    def report_saved(self) -> None:
        """Report to the driver which checkpoints are whole now."""
        while self.saver.last_good in self.unreported:
            self.send("saved", step=self.unreported.pop(0))

    def send(self, kind: str, **values: Any) -> None:
        if self.rank == 0:
            self.task.outbox.put({"kind": kind, **values})

    def beat(self) -> tuple[bool, bool]:
        """(whether to save and end, whether to save since a node is about to go): the same on all workers."""
        notice = ray.train.get_preemption_info()
        lost = notice is not None and notice != self.notice
        self.notice = notice
        stop = self.rank == 0 and not self.task.stop.empty()
        if self.world_size > 1:
            asked = torch.full((1,), float(stop), device=self.device)
            torch.distributed.broadcast(asked, 0)
            stop = bool(asked)
        return stop, lost

    def diverged(self) -> bool:
        """Whether a loss, gradient or weight was not finite since the start; then the driver is told the whole story."""
        first = self.state.first_bad.clone()
        if self.world_size > 1:
            torch.distributed.all_reduce(first[:1], torch.distributed.ReduceOp.MIN)
        update, loss, grad_norm = first.tolist()
        if math.isinf(update) and math.isfinite(self.state.parameter_norm()):
            return False
        what = "loss or gradient"
        if math.isinf(update):  # finite gradients that carried the weights away
            what, update = "weights", self.state.step - 1
        config, number = self.config, int(update)
        batch = self.task.dataset.global_batch(config.seed, number, config.optim.batch_size, config.shuffle_window)
        shown = ", ".join(map(str, batch[:8].tolist())) + (", ..." if len(batch) > 8 else "")
        self.saver.close()
        kept = "none" if self.saver.last_good is None else f"step {self.saver.last_good:,}"
        text = (
            f"{what} not finite at update {number + 1:,} of {config.preset} (loss {loss:g}, gradient norm {grad_norm:g}, "
            f"learning rate {config.optim.learning_rate(number):g}, images {shown}); the last good checkpoint is {kept}: "
            "lower --optim.lr or choose another objective"
        )
        facts = {"update": number + 1, LOSS: str(loss), GRAD_NORM: str(grad_norm), "images": batch.tolist()}
        self.send("diverged", text=text, facts=facts)
        return True


def sample_grid(config: TrainConfig, state: TrainState, diffusion: GaussianDiffusion, device: torch.device) -> bytes:
    """A PNG of samples from the EMA weights: the same noise at every step, so that one sees the same pictures grow."""
    network = UNet(config.unet).to(device).eval()
    network.load_state_dict(state.ema.state_dict())
    shape = (GRID, config.unet.in_channels, config.unet.image_size, config.unet.image_size)
    steps = min(GRID_STEPS, config.diffusion.num_timesteps)
    noise = rng.SampleNoise(config.seed, torch.arange(GRID, device=device), shape[1:], purpose="training samples")
    drawn = sample(diffusion, network, shape, noise=noise, method="ddim", steps=steps)
    return encode_png(tile(images.to_uint8(drawn).cpu().numpy(), GRID_COLUMNS))
