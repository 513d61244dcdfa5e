"""Training with salience: one plain loop, on one process or several; it touches no file.

All that is random in an epoch follows from the seed and the epoch's number, so that an exact resume
needs weights, optimizer, schedule and loss scaling, and nothing else."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, StepLR
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from diffsal.data.datasets import ImageDataset, Item, Unnormalized
from diffsal.errors import DiffsalError
from diffsal.maps.contrast import class_count, predicted_class
from diffsal.maps.modes import evaluated
from diffsal.maps.outputs import logits_of_run, output_logits
from diffsal.maps.salience import capture
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import TargetLayer, find_target_layer
from diffsal.training.config import Select, TrainingConfig
from diffsal.training.losses import SalienceLoss

Record: TypeAlias = dict[str, float]
"""An epoch's numbers: see :func:`fit`."""

Look: TypeAlias = Callable[[Tensor, Tensor], SalienceMaps]
"""Images (B, C, H, W) and labels (B,) to the maps of one more forward pass, as the batch's own."""

Further: TypeAlias = Callable[[Look, Tensor, Tensor, SalienceMaps], dict[str, tuple[float, Tensor]]]
"""More terms of the loss, which maps alone do not tell: of a :data:`Look` at the model, and a
batch's images (on its device), labels (on the CPU) and maps, by name the weight and the scalar."""

_STEP_EPOCHS, _STEP_FACTOR = 12, 0.1
_AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingState:
    """What training knows beside the model's weights.

    Attributes:
        optimizer: SGD, of the parameters that require gradients.
        scheduler: of its learning rate, once an epoch.
        scaler: of the loss; idle but for fp16.
        history: the records of the epochs that are done, without their seconds: equal runs have
            equal states.

    Example:
        >>> state = TrainingState(nn.Linear(2, 2), TrainingConfig(lr=0.1))
        >>> state.scheduler.get_last_lr(), state.history
        ([0.1], [])
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.optimizer = SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        schedules: dict[str, Callable[[], LRScheduler]] = {
            "none": lambda: ConstantLR(self.optimizer, factor=1),
            "step": lambda: StepLR(self.optimizer, _STEP_EPOCHS, _STEP_FACTOR),
            "cosine": lambda: CosineAnnealingLR(self.optimizer, config.epochs),
        }
        self.scheduler = schedules[config.schedule]()
        self.scaler = torch.amp.GradScaler(_device(model).type, enabled=config.amp == "fp16")
        self.history: list[Record] = []

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = [dict(record) for record in state["history"]]


def fit(
    model: nn.Module,
    criterion: SalienceLoss,
    training: ImageDataset,
    validation: ImageDataset | None,
    config: TrainingConfig,
    *,
    target_layer: TargetLayer | None = None,
    further: Further | None = None,
    state: TrainingState | None = None,
    progress: bool = True,
) -> Iterator[Record]:
    """Train a model in place, one epoch each time that the next record is asked for.

    ``history = list(fit(...))`` trains to the end. Where ``torch.distributed`` is initialised, its
    processes share each batch and apply the gradient of the whole of it; batch-norm statistics are
    of each process's share, and the first one's are kept. Torch's global generators are seeded
    anew for every epoch.

    Args:
        model: on its device.
        criterion: the loss, on the same.
        training: samples to learn from.
        validation: samples to measure AUROC and accuracy on; ``None``: the records have neither.
        config: of it all but what concerns the model, the data and the loss.
        target_layer: where maps are taken; ``None``: it is found.
        further: called after the criterion in every step; it may run the model again, in the same
            mode and precision. ``None``: the criterion is all.
        state: of a run to go on with; ``None``: a new one. It holds the record, but for the
            seconds, when that is yielded.
        progress: show a bar on stderr, if that is a terminal.

    Yields:
        ``epoch`` (from 1), ``lr``, ``loss`` and the loss's terms (means over the training samples),
        ``auroc``, ``accuracy``, ``seconds``.

    Raises:
        DiffsalError: a loss that is not finite (names epoch and step); batches that are too small
            for the processes; see :class:`diffsal.maps.salience.capture` and :func:`auroc`.

    Example:
        >>> from pathlib import Path
        >>> from diffsal.data.index import Sample
        >>> from diffsal.data.preprocessing import Preprocessing
        >>> def grey(sample, preprocessing):  # in the place of a file
        ...     return np.full((8, 8, 3), 255 * sample.label, np.uint8), None
        >>> samples = [Sample(Path(f"{number}.png"), number % 2) for number in range(8)]
        >>> dataset = ImageDataset(samples, Preprocessing(size=(8, 8)), read=grey)
        >>> _ = torch.manual_seed(0)
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> config = TrainingConfig(method="cross-entropy", epochs=5, lr=0.1)
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), *head)
        >>> history = list(fit(model, config.criterion(), dataset, dataset, config))
        >>> [record["epoch"] for record in history], history[-1]["auroc"]
        ([1, 2, 3, 4, 5], 1.0)
        >>> history[-1]["loss"] < history[0]["loss"]
        True
    """
    rank, world = _process()
    device = _device(model)
    layout = _memory_format(device, config)
    network = _distributed(model.to(memory_format=layout))
    layer = target_layer or find_target_layer(model)
    state = state or TrainingState(model, config)
    sampler = EpochSampler(len(training), config.batch_size, config.seed, rank, world)
    batches = _loader(training, config, device, batch_sampler=sampler)
    held_out = validation and _evaluation_loader(validation, config, device)

    def look(images: Tensor, labels: Tensor) -> SalienceMaps:
        with _autocast(device, config):
            logits = output_logits(network(images))
        return captured.maps(logits, true=labels)

    for epoch in range(len(state.history) + 1, config.epochs + 1):
        started = time.perf_counter()
        torch.manual_seed(_derived_seed(config.seed, epoch, 1 + rank))
        sampler.epoch = epoch
        _training_mode(model, config)
        steps: list[dict[str, Tensor]] = []
        bar = _bar(batches, f"epoch {epoch}/{config.epochs}", progress)
        with capture(network, layer) as captured:
            for share, (images, labels, human_maps, _) in zip(sampler.shares, bar, strict=True):
                images = images.to(device, non_blocking=True, memory_format=layout)
                images = training.normalized(images)
                maps = look(images, labels)
                terms = criterion.terms(maps, human_maps.to(device, non_blocking=True))
                loss = criterion.weighted_sum(terms)
                if further is not None:
                    for name, (weight, term) in further(look, images, labels, maps).items():
                        loss, terms[name] = loss + weight * term, term
                state.optimizer.zero_grad()
                # Averaged over the processes, this is the gradient of the whole batch's loss.
                state.scaler.scale(loss * (share * world)).backward()
                state.scaler.step(state.optimizer)
                state.scaler.update()
                steps.append({"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}})

        record: Record = {"epoch": epoch, "lr": float(state.scheduler.get_last_lr()[0])}
        record |= _means(steps, sampler, f"epoch {epoch}")
        state.scheduler.step()
        if validation and held_out:
            bar = _bar(held_out, "validation", progress)
            logits = _predict(model, bar, validation, config)
            record |= _scores(logits, validation, f"epoch {epoch}")
        state.history.append(record)
        yield {**record, "seconds": time.perf_counter() - started}


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of positions and seeds for one process; order and seeds follow from the epoch.

    Samples are spread evenly over an epoch's batches, and a batch's over the processes.

    Attributes:
        epoch: set it before each pass.
        sizes: of the batches, over all processes.
        shares: the part of each batch that falls to this process.

    Example:
        >>> sampler = EpochSampler(samples=7, batch_size=4, seed=0)
        >>> sampler.sizes, sampler.shares
        ([4, 3], [1.0, 1.0])
        >>> sorted(position for batch in sampler for position, seed in batch)
        [0, 1, 2, 3, 4, 5, 6]
    """

    def __init__(
        self, samples: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        batches = torch.arange(samples).tensor_split(math.ceil(samples / batch_size))
        self.sizes = [len(batch) for batch in batches]
        if min(self.sizes) < world:
            raise DiffsalError(
                f"a batch of {min(self.sizes)} samples is too small for {world} processes; raise "
                "the batch size, or start fewer"
            )
        self.shares = [len(batch.tensor_split(world)[rank]) / len(batch) for batch in batches]
        self.epoch = 0
        self._seed, self._rank, self._world = seed, rank, world

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(_derived_seed(self._seed, self.epoch))
        order = torch.randperm(sum(self.sizes), generator=generator)
        seeds = torch.randint(2**62, order.shape, generator=generator)
        for batch in torch.split(order, self.sizes):
            mine = batch.tensor_split(self._world)[self._rank]
            yield list(zip(mine.tolist(), seeds[mine].tolist(), strict=True))


def predict(
    model: nn.Module, dataset: ImageDataset, config: TrainingConfig, *, progress: bool = False
) -> Tensor:
    """Logits (N, K) float32 on the CPU, in the data set's order; the model is left as it was.

    Where ``torch.distributed`` is initialised, its processes share the work, and each gets all.

    Args:
        model: on its device.
        dataset: N samples.
        config: of it ``batch_size``, ``amp`` and ``workers``.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        DiffsalError: an image that cannot be read.
    """
    batches = _evaluation_loader(dataset, config, _device(model))
    return _predict(model, _bar(batches, "prediction", progress), dataset, config)


def auroc(logits: Tensor, labels: Sequence[int]) -> float:
    """Area under the ROC curve of the margin of class 1, by scikit-learn.

    Of more than two classes: the mean over classes of the area of each against the rest, by its
    probability.

    Args:
        logits: (N, K) float32.
        labels: N, among them every class.

    Raises:
        DiffsalError: a class without a label.

    Example:
        >>> auroc(torch.tensor([[0.0, 1.0], [2.0, 2.0], [0.0, -3.0]]), [1, 0, 0])
        1.0
    """
    if len(set(labels)) < class_count(logits):
        raise DiffsalError("AUROC is undefined: no sample of one of the classes; add some")
    if logits.shape[1] > 2:
        shares = logits.double().softmax(1).numpy()
        return float(roc_auc_score(labels, shares, multi_class="ovr"))
    margin = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
    return float(roc_auc_score(labels, margin.numpy()))


def is_best(history: Sequence[Record], select: Select) -> bool:
    """Whether the model of the last of these records is the one to select so far.

    Example:
        >>> history = [{"auroc": 0.8}, {"auroc": 0.9}, {"auroc": 0.9}]
        >>> [is_best(history[:epoch], "best-auroc") for epoch in (1, 2, 3)]
        [True, True, False]
    """
    if select == "last":
        return True
    *earlier, last = (record[select.removeprefix("best-")] for record in history)
    return all(last > value for value in earlier)


def _predict(
    model: nn.Module,
    batches: Iterable[Any],
    dataset: ImageDataset,
    config: TrainingConfig,
) -> Tensor:
    device = _device(model)
    if _process()[1] > 1:
        for buffer in model.buffers():  # batch-norm statistics are each process's own
            dist.broadcast(buffer, 0)
    parts = []
    with evaluated(model) as run, torch.no_grad():
        for images, _, _, positions in batches:
            inputs = dataset.normalized(images.to(device, non_blocking=True))
            with _autocast(device, config):
                logits = logits_of_run(run, inputs).logits
            parts.append((positions, logits.float().view(len(images), -1)))
    parts = _gathered([(positions, logits.cpu()) for positions, logits in parts])
    positions, logits = map(torch.cat, zip(*parts, strict=True))
    return logits[positions.argsort()]


def _scores(logits: Tensor, dataset: ImageDataset, place: str) -> Record:
    if not logits.isfinite().all():
        raise _diverged(place, "a validation logit")
    labels = [sample.label for sample in dataset.samples]
    right = predicted_class(logits) == torch.tensor(labels)
    return {"auroc": auroc(logits, labels), "accuracy": float(right.double().mean())}


def _means(steps: Sequence[Mapping[str, Tensor]], sampler: EpochSampler, place: str) -> Record:
    """Means over the samples of all processes, from every step's means over this one's.

    The values are first looked at here, since looking at each step's would wait for the device.
    """
    table = torch.stack([torch.stack(list(step.values())) for step in steps])
    table *= torch.tensor(sampler.shares).to(table)[:, None]
    if _process()[1] > 1:
        dist.all_reduce(table)
    table = table.cpu().double()
    bad = (~table.isfinite().all(1)).nonzero()
    if len(bad):
        raise _diverged(f"{place}, step {int(bad[0]) + 1}", "the loss")
    sizes = torch.tensor(sampler.sizes, dtype=torch.float64)
    return dict(zip(steps[0], (sizes @ table / sizes.sum()).tolist(), strict=True))


def _diverged(place: str, what: str) -> DiffsalError:
    return DiffsalError(
        f"{place}: {what} is not finite; lower the learning rate, or train without fp16"
    )


def _loader(
    dataset: ImageDataset, config: TrainingConfig, device: torch.device, **batches: Any
) -> DataLoader[Item]:
    return DataLoader(
        Unnormalized(dataset),
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it would draw from the global one
        **batches,
    )


def _evaluation_loader(
    dataset: ImageDataset, config: TrainingConfig, device: torch.device
) -> DataLoader[Item]:
    rank, world = _process()
    mine = range(rank, len(dataset), world)
    return _loader(dataset, config, device, batch_size=config.batch_size, sampler=mine)


def _bar(batches: DataLoader[Item], title: str, progress: bool) -> Iterator[Any]:
    """The batches, with a bar; what a worker raises comes without the worker's traceback."""
    # None: shown where stderr is a terminal.
    disable = None if progress and _process()[0] == 0 else True
    try:
        yield from tqdm(batches, title, leave=False, disable=disable)
    except DiffsalError as error:
        raise DiffsalError(str(error).strip().rpartition("DiffsalError: ")[2]) from error


def _memory_format(device: torch.device, config: TrainingConfig) -> torch.memory_format:
    """In half precision, convolutions on the GPU take channels last, or turn each tensor round."""
    is_fast = device.type == "cuda" and config.amp != "none"
    return torch.channels_last if is_fast else torch.preserve_format


def _autocast(device: torch.device, config: TrainingConfig) -> torch.autocast:
    amp_type = _AMP_TYPES[config.amp]
    return torch.autocast(device.type, amp_type, enabled=amp_type is not None)


def _training_mode(model: nn.Module, config: TrainingConfig) -> None:
    model.train()
    for module in model.modules():
        if config.freeze_batchnorm and isinstance(module, _BatchNorm):
            module.eval()


def _process() -> tuple[int, int]:
    """Rank and number of the processes that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _gathered(parts: list[Any]) -> list[Any]:
    """The lists of all processes in one."""
    lists: list[list[Any]] = [parts] * _process()[1]
    if len(lists) > 1:
        dist.all_gather_object(lists, parts)
    return [part for one in lists for part in one]


def _distributed(model: nn.Module) -> nn.Module:
    """The model as one of the processes trains it, where there are several."""
    device = _device(model)
    ids = [device] if device.type == "cuda" else None
    return model if _process()[1] == 1 else DistributedDataParallel(model, ids)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _derived_seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
