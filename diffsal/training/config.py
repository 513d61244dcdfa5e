"""Training with salience: one plain loop, on one process or several, and runs that can be resumed.

:func:`fit` is the loop, :func:`train` puts a run's folder round it. All that is random in an epoch
follows from the seed and the epoch's number, so that an exact resume needs weights, optimizer,
schedule and loss scaling, and nothing else.
"""

import difflib
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

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
from torchvision.transforms import v2
from tqdm import tqdm

from diffsal.contrast import class_count, predicted_class
from diffsal.data import (
    AUGMENTATIONS,
    ImageDataset,
    Index,
    Item,
    Pixels,
    Sample,
    Split,
    decode,
    with_validation,
)
from diffsal.devices import choose_device, process_rank
from diffsal.errors import DiffsalError
from diffsal.files import replacing
from diffsal.images import Preprocessing
from diffsal.losses import LOSSES, Pool, SalienceLoss
from diffsal.models import (
    build_model,
    check_class_order,
    load_model,
    redraw_fresh_layers,
    save_checkpoint,
)
from diffsal.salience import capture, evaluation_mode, output_logits
from diffsal.target_layers import TargetLayer, find_target_layer, get_target_layer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "BEST",
    "LAST",
    "LOG",
    "Amp",
    "EpochSampler",
    "Record",
    "Schedule",
    "Select",
    "TrainingConfig",
    "TrainingState",
    "auroc",
    "check_split",
    "fit",
    "is_best",
    "new_model",
    "predict",
    "read_toml",
    "train",
    "training_set",
]

BEST = "best.pt"
LAST = "last.pt"
LOG = "log.jsonl"

Record: TypeAlias = dict[str, float]
"""An epoch's numbers: see :func:`fit`."""
Schedule: TypeAlias = Literal["none", "step", "cosine"]
Select: TypeAlias = Literal["last", "best-auroc", "best-accuracy"]
Amp: TypeAlias = Literal["none", "bf16", "fp16"]

_DEFAULT_ARCHITECTURE = "densenet121"
_STEP_EPOCHS, _STEP_FACTOR = 12, 0.1
_AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a resumed run may change: on a CPU, none of it changes the result.
_FREE = ("device", "workers", "tensorboard")


# ------------------------------------------------------------------------------------------ config


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    The defaults are the paper's (DenseNet-121 with ImageNet weights, 224², SGD, learning rate
    0.002, 50 epochs) and, where it is silent, those of the published CYBORG script of its authors
    (momentum, weight decay, schedule, batch size).

    Attributes:
        method: a name in :data:`diffsal.losses.LOSSES`.
        alpha: weight of the cross-entropy; ``None``: the paper's for the method, as for the others.
        beta: weight of the term with the human map.
        gamma: weight of the third term.
        pool: how human maps come to the size of the model's: ``area`` or ``max``.
        architecture: see :func:`diffsal.models.build_model`; ``None``: what the weights file says,
            else ``densenet121``.
        arguments: of the architecture's constructor. torchvision's and timm's need no
            ``num_classes``; 1 makes a model of one logit.
        weights: ``none``; a name of published ones, which is upper case, as ``DEFAULT``; or else a
            file, whose last layer is used where it tells as many classes apart, and is drawn anew,
            as torch does, where not.
        target_layer: dotted name; ``None``: it is found.
        size: height and width of the input, in pixels.
        resize: ``squash`` or ``crop``, see :class:`diffsal.images.Preprocessing`.
        mean: of the colours; ``None``: what the weights file says, else ImageNet's.
        std: likewise.
        augment: names in :data:`diffsal.data.AUGMENTATIONS`.
        validation: the share of the training samples to validate on, where the index names none.
        epochs: passes over the training samples.
        batch_size: most samples in a batch, of all processes together; an epoch's samples are
            spread evenly over as many batches as this takes.
        lr: learning rate of SGD at the start.
        momentum: of SGD.
        weight_decay: of SGD.
        schedule: of the learning rate: ``none``, ``step`` (a tenth every 12 epochs), ``cosine``.
        freeze_batchnorm: normalise by the statistics that the model came with.
        select: whose epoch's model the run is for: ``last``, ``best-auroc``, ``best-accuracy``, on
            the validation samples; the first of equals.
        seed: of all that is random.
        amp: type of automatic mixed precision: ``none``, ``bf16``, ``fp16``.
        device: see :func:`diffsal.devices.choose_device`.
        workers: processes that read images; 0: none but this one.
        tensorboard: write the log for TensorBoard too.

    Raises:
        DiffsalError: a value that cannot be used; names the key.
    """

    method: str = "contrast"
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    pool: Pool = "area"
    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str = "DEFAULT"
    target_layer: str | None = None
    size: int = 224
    resize: Literal["squash", "crop"] = "squash"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    augment: tuple[str, ...] = ()
    validation: float = 0.2
    epochs: int = 50
    batch_size: int = 20
    lr: float = 0.002
    momentum: float = 0.9
    weight_decay: float = 1e-6
    schedule: Schedule = "step"
    freeze_batchnorm: bool = False
    select: Select = "last"
    seed: int = 0
    amp: Amp = "none"
    device: str = "auto"
    workers: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(TrainingConfig).items():
            value = getattr(self, name)
            if not _is_of(value, kind):
                raise _bad_value(name, value, _words(kind))
            low, high = _RANGES.get(name, (-math.inf, math.inf))
            if isinstance(value, int | float) and not low <= value <= high:
                raise _bad_value(name, value, f"from {low} to {high:g}")
        for name, known in ((self.method, LOSSES), *((one, AUGMENTATIONS) for one in self.augment)):
            if name not in known:
                raise _bad_value("method or augment", name, f"one of {', '.join(known)}")
        self.criterion()
        self.preprocessing()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "training") -> "TrainingConfig":
        """Undo :meth:`to_dict`; what is left out is as by default.

        Raises:
            DiffsalError: an unknown key, or a value that cannot be used.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known) or known
                raise DiffsalError(
                    f"{source}: the key {name!r} is unknown; near: {', '.join(near)}"
                )
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**arguments)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> "TrainingConfig":
        """Read a TOML file whose keys are the attributes; ``overrides`` win.

        Raises:
            DiffsalError: see :func:`read_toml` and :meth:`from_dict`.
        """
        return cls.from_dict({**read_toml(path), **overrides}, str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` undoes it."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def criterion(self) -> SalienceLoss:
        """The method's loss.

        Raises:
            DiffsalError: a weight that the method does not have.
        """
        given = {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma, "pool": self.pool}
        options = {name: value for name, value in given.items() if value is not None}
        if self.method == "cross-entropy":
            del options["pool"]  # it has no maps to pool
        loss = LOSSES[self.method]
        for name in options:
            if name not in signature(loss).parameters:
                raise DiffsalError(f"training: {self.method} has no {name}; leave it out")
        return loss(**options)  # type: ignore[arg-type]

    def preprocessing(self, base: Preprocessing | None = None) -> Preprocessing:
        """Of the model's input; mean and std are those of ``base`` where they are not given."""
        base = base or Preprocessing()
        size = self.size, self.size
        return Preprocessing(size, self.resize, self.mean or base.mean, self.std or base.std)

    def augmentation(self) -> v2.Transform | None:
        """Of the training samples, for :class:`diffsal.data.ImageDataset`."""
        chosen = [AUGMENTATIONS[name]() for name in self.augment]
        return v2.Compose(chosen) if chosen else None


def read_toml(path: str | Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        DiffsalError: it cannot be read.
    """
    try:
        content: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DiffsalError(f"{path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise DiffsalError(f"{path}: is no TOML ({error}); correct it") from error
    return content


_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("size", "epochs", "batch_size"), (1, 2**31)),
    **dict.fromkeys(("alpha", "beta", "gamma", "lr", "weight_decay"), (0, sys.float_info.max)),
    "momentum": (0, 1),
    "seed": (0, 2**32 - 1),
    "workers": (0, 2**16),
}


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; a whole number is a number, True is not."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is UnionType:
        return any(_is_of(value, one) for one in arguments)
    if origin is tuple and isinstance(value, tuple):
        kinds = arguments[:1] * len(value) if Ellipsis in arguments else arguments
        return len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if kind is Any:
        return True
    return type(value) in ((int, float) if kind is float else (origin or kind,))


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _bad_value(name: str, value: Any, wanted: str) -> DiffsalError:
    return DiffsalError(f"training: {name} must be {wanted}, not {value!r}")


# --------------------------------------------------------------------------------------------- fit


class TrainingState:
    """What training knows beside the model's weights.

    Attributes:
        optimizer: SGD, of the parameters that require gradients.
        scheduler: of its learning rate, once an epoch.
        scaler: of the loss; idle but for fp16.
        history: the records of the epochs that are done.
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
        self.history = list(state["history"])


def fit(
    model: nn.Module,
    criterion: SalienceLoss,
    training: ImageDataset,
    validation: ImageDataset | None,
    config: TrainingConfig,
    *,
    target_layer: TargetLayer | None = None,
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
        state: of a run to go on with; ``None``: a new one. It holds the record when that is
            yielded.
        progress: show a bar on stderr, if that is a terminal.

    Yields:
        ``epoch`` (from 1), ``lr``, ``loss`` and the loss's terms (means over the training samples),
        ``auroc``, ``accuracy``, ``seconds``.

    Raises:
        DiffsalError: a loss that is not finite (names epoch and step); batches that are too small
            for the processes; see :class:`diffsal.salience.capture` and :func:`auroc`.
    """
    rank, world = _process()
    device, amp_type = _device(model), _AMP_TYPES[config.amp]
    layout = _memory_format(device, config)
    model.to(memory_format=layout)
    network = model if world == 1 else DistributedDataParallel(model, _device_ids(device))
    layer = target_layer or find_target_layer(model)
    state = state or TrainingState(model, config)
    sampler = EpochSampler(len(training), config.batch_size, config.seed, rank, world)
    batches = _loader(training, config, device, batch_sampler=sampler)
    held_out = validation and _evaluation_loader(validation, config, device)

    for epoch in range(len(state.history) + 1, config.epochs + 1):
        started = time.perf_counter()
        torch.manual_seed(_derived_seed(config.seed, epoch, 1 + rank))
        sampler.epoch = epoch
        model.train()
        if config.freeze_batchnorm:
            _freeze_batchnorm(model)
        steps: list[dict[str, Tensor]] = []
        bar = _bar(batches, f"epoch {epoch}/{config.epochs}", progress)
        with capture(network, layer) as captured:
            for share, (images, labels, human_maps, _) in zip(sampler.shares, bar, strict=True):
                with torch.autocast(device.type, amp_type, enabled=amp_type is not None):
                    images = images.to(device, non_blocking=True, memory_format=layout)
                    logits = output_logits(network(images))
                maps = captured.maps(logits, true=labels)
                terms = criterion.terms(maps, human_maps.to(device, non_blocking=True))
                loss = criterion.weighted_sum(terms)
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
            logits = _predict(model, _bar(held_out, "validation", progress), config)
            record |= _scores(logits, validation, f"epoch {epoch}")
        record["seconds"] = time.perf_counter() - started
        state.history.append(record)
        yield record


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of positions and seeds for one process; order and seeds follow from the epoch.

    Samples are spread evenly over an epoch's batches, and a batch's over the processes.

    Attributes:
        epoch: set it before each pass.
        sizes: of the batches, over all processes.
        shares: the part of each batch that falls to this process.
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
    return _predict(model, _bar(batches, "prediction", progress), config)


def auroc(logits: Tensor, labels: Sequence[int]) -> float:
    """Area under the ROC curve of the margin of class 1, by scikit-learn.

    Of more than two classes: the mean over classes of the area of each against the rest, by its
    probability.

    Args:
        logits: (N, K) float32.
        labels: N, among them every class.

    Raises:
        DiffsalError: a class without a label.
    """
    if len(set(labels)) < class_count(logits):
        raise DiffsalError("AUROC is undefined: no sample of one of the classes; add some")
    if logits.shape[1] > 2:
        shares = logits.double().softmax(1).numpy()
        return float(roc_auc_score(labels, shares, multi_class="ovr"))
    margin = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
    return float(roc_auc_score(labels, margin.numpy()))


def is_best(history: Sequence[Record], select: Select) -> bool:
    """Whether the model of the last of these records is the one to select so far."""
    if select == "last":
        return True
    *earlier, last = (record[select.removeprefix("best-")] for record in history)
    return all(last > value for value in earlier)


def _predict(model: nn.Module, batches: Iterable[Any], config: TrainingConfig) -> Tensor:
    device, amp_type = _device(model), _AMP_TYPES[config.amp]
    if _process()[1] > 1:
        for buffer in model.buffers():  # batch-norm statistics are each process's own
            dist.broadcast(buffer, 0)
    parts = []
    with evaluation_mode(model), torch.no_grad():
        for images, _, _, positions in batches:
            with torch.autocast(device.type, amp_type, enabled=amp_type is not None):
                logits = output_logits(model(images.to(device, non_blocking=True)))
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
        dataset,
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


def _freeze_batchnorm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
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


def _device_ids(device: torch.device) -> list[torch.device] | None:
    return [device] if device.type == "cuda" else None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _derived_seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


# ------------------------------------------------------------------------------------------- train


def train(
    index: Index,
    out: str | Path,
    config: TrainingConfig,
    *,
    resume: bool = False,
    read: Callable[[Sample, Preprocessing], Pixels] = decode,
) -> Path:
    """Train a model on an index, and leave a run in a folder.

    Each epoch leaves a line in ``log.jsonl`` (its record, see :func:`fit`) and on stderr,
    ``best.pt`` (the selected model so far, for ``diffsal explain --model``) and ``last.pt`` (the
    latest, with all that resuming needs). Checkpoints are replaced whole: a process that is killed
    loses the epoch that it is in, and no other.

    Under torchrun, all processes train one model and the first one writes; all must see ``out``.

    Args:
        index: see :func:`diffsal.data.with_validation` for what is learnt and what is validated on.
        out: folder of the run; made where it is not there.
        config: see there.
        resume: go on after the last finished epoch; from the start, where there is none.
        read: see :class:`diffsal.data.ImageDataset`.

    Returns:
        The path of ``best.pt``.

    Raises:
        DiffsalError: ``out`` holds a run and ``resume`` is off, or it is a run of another
            configuration; a split lacks a class; the method needs human maps and there are none;
            see :func:`fit`, :func:`diffsal.data.hold_out` and :func:`diffsal.models.build_model`.
    """
    out, device = Path(out), choose_device(config.device)
    index = with_validation(index, config.validation, config.seed)
    for split in ("train", "val"):
        check_split(index, split, config.method)
    with _process_group(device) as is_first:
        checkpoint = _read_run(out / LAST, resume, _identity(index, config))
        if checkpoint is None:
            model, description = new_model(index, config)
        else:
            model, description = _saved_model(out / LAST, config)
        state = TrainingState(model.to(device), config)
        if checkpoint is not None:
            state.load_state_dict(checkpoint["training"])
        training = training_set(index, config, description["preprocessing"], read)
        unseen = [replace(sample, map=None) for sample in index.split("val")]
        validation = ImageDataset(unseen, training.preprocessing, read=read)
        _check_outputs(model, validation, index, config)
        records = fit(
            model,
            config.criterion(),
            training,
            validation,
            config,
            target_layer=get_target_layer(model, description["target_layer"]),
            state=state,
        )
        with _log(out, config, state.history) if is_first else nullcontext() as log:
            for record in records:
                if log is None:
                    continue
                if is_best(state.history, config.select):
                    save_checkpoint(out / BEST, model, **description, config=config.to_dict())
                log(record)
                # With this file the epoch counts; resuming without it writes the others again.
                run: dict[str, Any] = {
                    "run": _identity(index, config),
                    "training": state.state_dict(),
                }
                save_checkpoint(out / LAST, model, **description, **run)
    return out / BEST


def new_model(index: Index, config: TrainingConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The model to begin with, on the CPU; what is random in it follows from ``config.seed``.

    Returns:
        The model, and what :func:`diffsal.models.save_checkpoint` takes beside it:
        ``architecture``, ``arguments``, ``classes``, ``preprocessing``, ``target_layer``.

    Raises:
        DiffsalError: weights for other classes than the index's; see
            :func:`diffsal.models.build_model` and :func:`diffsal.models.load_model`.
    """
    torch.manual_seed(config.seed)
    architecture, base = config.architecture or _DEFAULT_ARCHITECTURE, None
    arguments = {**_with_classes(architecture, {}, index), **config.arguments}
    if config.weights == "none":
        model = build_model(architecture, arguments)
    elif re.fullmatch("[A-Z0-9_]+", config.weights):
        model = build_model(architecture, arguments, weights=config.weights)
    else:
        loaded = load_model(config.weights, arch=config.architecture)
        check_class_order(loaded, index.classes, index.source)
        architecture, base = loaded.architecture, loaded.preprocessing
        arguments = {**_with_classes(architecture, loaded.arguments, index), **config.arguments}
        model = build_model(architecture, arguments)
        _copy_weights(loaded.model, model)
    return model, {
        "architecture": architecture,
        "arguments": arguments,
        "classes": index.classes,
        "preprocessing": config.preprocessing(base),
        "target_layer": config.target_layer or find_target_layer(model).name,
    }


def training_set(
    index: Index,
    config: TrainingConfig,
    preprocessing: Preprocessing,
    read: Callable[[Sample, Preprocessing], Pixels] = decode,
) -> ImageDataset:
    """The samples of the split ``train``, with human maps where the method learns from them."""
    samples = index.split("train")
    if config.method == "cross-entropy":
        samples = tuple(replace(sample, map=None) for sample in samples)
    return ImageDataset(samples, preprocessing, config.augmentation(), read)


def check_split(index: Index, split: Split, method: str) -> None:
    """See that a split has each class, and human maps if it is what such a method learns from.

    Raises:
        DiffsalError: it has not.
    """
    labels = {sample.label for sample in index.split(split)}
    for label, name in enumerate(index.classes):
        if label not in labels:
            raise DiffsalError(
                f"{index.source}: no sample of class {name!r} is in the split {split}, which "
                "leaves AUROC undefined; name other splits, or choose another seed or fraction"
            )
    has_maps = any(sample.map for sample in index.split(split))
    if split == "train" and method != "cross-entropy" and not has_maps:
        raise DiffsalError(
            f"{index.source}: no training sample has a human map, which the method {method} "
            "learns from; add maps, or train with cross-entropy"
        )


@contextmanager
def _process_group(device: torch.device) -> Iterator[bool]:
    """Join the processes that torchrun started, if it did; yields whether this is the first."""
    rank, world = process_rank()
    if world == 1 or dist.is_initialized():  # by the caller, who also ends it
        yield rank == 0
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield rank == 0
    finally:
        dist.destroy_process_group()


def _check_outputs(
    model: nn.Module, dataset: ImageDataset, index: Index, config: TrainingConfig
) -> None:
    first = ImageDataset(dataset.samples[:1], dataset.preprocessing, read=dataset.read)
    count = class_count(predict(model, first, replace(config, workers=0)))
    if count != len(index.classes):
        raise DiffsalError(
            f"the model tells {count} classes apart, {index.source} has {len(index.classes)}; set "
            "num_classes among the architecture's arguments"
        )


def _with_classes(architecture: str, arguments: Mapping[str, Any], index: Index) -> dict[str, Any]:
    """Constructor's arguments for as many classes; a factory need not take their number."""
    classes, outputs = len(index.classes), arguments.get("num_classes")
    is_factory = ":" in architecture and not architecture.startswith(("torchvision:", "timm:"))
    if (is_factory and outputs is None) or (outputs == 1 and classes == 2):
        return dict(arguments)
    return {**arguments, "num_classes": classes}


def _saved_model(path: Path, config: TrainingConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The same from a run's checkpoint."""
    loaded = load_model(path, arch=config.architecture)
    return loaded.model, {
        "architecture": loaded.architecture,
        "arguments": loaded.arguments,
        "classes": loaded.classes,
        "preprocessing": loaded.preprocessing,
        "target_layer": loaded.target_layer.name,
    }


def _copy_weights(source: nn.Module, model: nn.Module) -> None:
    """Copy what has the same shape: all, or all but the last layer."""
    own, given = model.state_dict(), source.state_dict()
    fitting = {
        name: value
        for name, value in given.items()
        if name in own and value.shape == own[name].shape
    }
    model.load_state_dict(fitting, strict=False)
    redraw_fresh_layers(model, fitting)


def _identity(index: Index, config: TrainingConfig) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    samples = [
        (
            index.relative(sample.path),
            sample.label,
            sample.split,
            sample.map and index.relative(sample.map),
        )
        for sample in index.samples
    ]
    return {
        **{name: value for name, value in config.to_dict().items() if name not in _FREE},
        "classes": list(index.classes),
        "samples": hashlib.sha256(repr(samples).encode()).hexdigest(),
    }


def _read_run(path: Path, resume: bool, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of a run to go on with, checked; ``None``: there is none."""
    if not path.exists():
        return None
    if not resume:
        raise DiffsalError(f"{path.parent}: holds a run; --resume it, or choose another --out")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise DiffsalError(
            f"{path}: is damaged and cannot be resumed; remove it to begin anew"
        ) from error
    started = checkpoint.get("run", {})
    for name, value in identity.items():
        if started.get(name) != value:
            raise DiffsalError(
                f"{path}: its run has {name} {started.get(name)!r}, not {value!r}; "
                "resume with what it was started with, or choose another --out"
            )
    return checkpoint


@contextmanager
def _log(
    out: Path, config: TrainingConfig, history: Sequence[Record]
) -> Iterator[Callable[[Record], None]]:
    """Logs that hold the finished epochs, and what adds a record to them."""
    with replacing(out / LOG) as scratch:  # without what was logged of an unfinished epoch
        scratch.write_text("".join(map(_line, history)), encoding="utf-8")
    board = _tensorboard(out, len(history)) if config.tensorboard else nullcontext()
    with board as writer, (out / LOG).open("a", encoding="utf-8", buffering=1) as file:

        def log(record: Record) -> None:
            file.write(_line(record))
            scores = ", ".join(f"{key} {record[key]:.4f}" for key in ("loss", "auroc", "accuracy"))
            tqdm.write(f"epoch {record['epoch']}/{config.epochs}: {scores}", file=sys.stderr)
            if writer is not None:
                for name, value in record.items():
                    writer.add_scalar(name, value, record["epoch"])

        yield log


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _tensorboard(out: Path, epochs: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DiffsalError(
            "tensorboard is not installed; pip install 'diffsal[tensorboard]'"
        ) from error
    return SummaryWriter(out / "tensorboard", purge_step=epochs + 1)
