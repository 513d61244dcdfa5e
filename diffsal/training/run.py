"""A training run: a folder of checkpoints and a log that can be resumed."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from diffsal.data.datasets import ImageDataset, Pixels, decode
from diffsal.data.index import Index, Sample, Split
from diffsal.data.preprocessing import Preprocessing
from diffsal.data.splits import with_validation
from diffsal.errors import DiffsalError
from diffsal.maps.contrast import class_count
from diffsal.maps.target_layers import find_target_layer, get_target_layer
from diffsal.models.architectures import build_model, redraw_fresh_layers
from diffsal.models.checkpoints import check_class_order, load_model, save_checkpoint
from diffsal.models.fitting import fit_stem, input_channels
from diffsal.system.devices import choose_device
from diffsal.system.files import open_regular, replacing, writing
from diffsal.system.locks import sole_writer
from diffsal.system.processes import process_group
from diffsal.training.config import TrainingConfig
from diffsal.training.loop import Record, TrainingState, fit, is_best, predict

BEST = "best.pt"
LAST = "last.pt"
LOG = "log.jsonl"
_DEFAULT_ARCHITECTURE = "densenet121"
# What a resumed run may change: on a CPU, none of it changes the result.
_FREE = ("device", "workers", "tensorboard")


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
        index: see :func:`diffsal.data.splits.with_validation` for what is learnt and what is
            validated on.
        out: folder of the run; made where it is not there.
        config: see there.
        resume: go on after the last finished epoch; from the start, where there is none.
        read: see :class:`diffsal.data.datasets.ImageDataset`.

    Returns:
        The path of ``best.pt``.

    Raises:
        DiffsalError: ``out`` holds a run and ``resume`` is off, or it is a run of another
            configuration; another run is writing there; a split lacks a class; the method
            needs human maps and there are none; see :func:`fit`,
            :func:`diffsal.data.splits.hold_out` and
            :func:`diffsal.models.architectures.build_model`.
    """
    out, device = Path(out), choose_device(config.device)
    index = with_validation(index, config.validation, config.seed)
    for split in ("train", "val"):
        check_split(index, split, config.method)
    with (
        process_group(device) as is_first,
        sole_writer(out) if is_first else nullcontext(),
    ):
        identity = _identity(index, config)
        model, description, state = _begin(out / LAST, index, config, identity, resume, device)
        training = training_set(index, config, description["preprocessing"], read)
        unseen = [replace(sample, map=None) for sample in index.split("val")]
        validation = ImageDataset(unseen, training.preprocessing, read=read)
        _check_outputs(model, validation, index, config)
        layer, criterion = get_target_layer(model, description["target_layer"]), config.criterion()
        records = fit(
            model, criterion, training, validation, config, target_layer=layer, state=state
        )
        with _log(out, config, state.history) if is_first else nullcontext() as log:
            for record in records:
                if log is None:
                    continue
                if is_best(state.history, config.select):
                    save_checkpoint(out / BEST, model, **description, config=config.to_dict())
                log(record)
                # With this file the epoch counts; resuming without it writes the others again.
                run: dict[str, Any] = {"run": identity, "training": state.state_dict()}
                save_checkpoint(out / LAST, model, **description, **run)
    return out / BEST


def new_model(index: Index, config: TrainingConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The model to begin with, on the CPU; what is random in it follows from ``config.seed``.

    Returns:
        The model, and what :func:`diffsal.models.checkpoints.save_checkpoint` takes beside it:
        ``architecture``, ``arguments``, ``classes``, ``preprocessing``, ``target_layer``.

    Raises:
        DiffsalError: weights for other classes than the index's; see
            :func:`diffsal.models.architectures.build_model` and
            :func:`diffsal.models.checkpoints.load_model`.
    """
    torch.manual_seed(config.seed)
    architecture, base = config.architecture or _DEFAULT_ARCHITECTURE, None
    arguments = {**_with_classes(architecture, {}, index), **config.arguments}
    if config.weights == "none":
        model = build_model(architecture, arguments)
    elif re.fullmatch("[A-Z0-9_]+", config.weights):
        model = build_model(architecture, arguments, weights=config.weights)
    else:
        loaded = load_model(
            config.weights, arch=config.architecture, trust_arguments=config.arguments
        )
        check_class_order(loaded, index.classes, index.source)
        architecture, base = loaded.architecture, loaded.preprocessing
        arguments = {**_with_classes(architecture, loaded.arguments, index), **config.arguments}
        model = build_model(architecture, arguments)
        fit_stem(model, loaded.model.state_dict())
        _copy_weights(loaded.model, model)
    return model, {
        "architecture": architecture,
        "arguments": arguments,
        "classes": index.classes,
        "preprocessing": replace(config.preprocessing(base), channels=input_channels(model)),
        "target_layer": config.target_layer or str(find_target_layer(model)),
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


def _begin(
    path: Path,
    index: Index,
    config: TrainingConfig,
    identity: Mapping[str, Any],
    resume: bool,
    device: torch.device,
) -> tuple[nn.Module, dict[str, Any], TrainingState]:
    """A new model with its description and state, or those of the run whose checkpoint is there."""
    checkpoint = _read_run(path, resume, identity)
    if checkpoint is None:
        model, description = new_model(index, config)
    else:
        model, description = _saved_model(path, config)
    state = TrainingState(model.to(device), config)
    if checkpoint is not None:
        try:
            state.load_state_dict(checkpoint["training"])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a foreign state makes torch raise almost anything
            raise _damaged(path) from error
    return model, description, state


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
    loaded = load_model(path, arch=config.architecture, trust_arguments=config.arguments)
    return loaded.model, {
        "architecture": loaded.architecture,
        "arguments": loaded.arguments,
        "classes": loaded.classes,
        "preprocessing": loaded.preprocessing,
        "target_layer": str(loaded.target_layer),
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
        (index.relative(one.path), one.label, one.split, one.map and index.relative(one.map))
        for one in index.samples
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
        file = open_regular(path)
    except OSError as error:
        raise DiffsalError(
            f"{path}: cannot be read ({error.strerror}); allow it, or choose another --out"
        ) from error
    except DiffsalError as error:
        raise DiffsalError(f"{path}: {error}, or choose another --out") from error
    try:
        with file:
            checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise _damaged(path) from error
    started = checkpoint.get("run") if isinstance(checkpoint, dict) else None
    if not isinstance(started, dict):
        raise _damaged(path)
    for name, value in identity.items():
        if not _is_same(started.get(name), value):
            raise DiffsalError(
                f"{path}: its run has {name} {started.get(name)!r}, not {value!r}; "
                "resume with what it was started with, or choose another --out"
            )
    return checkpoint


def _is_same(started: Any, value: Any) -> bool:
    try:
        return bool(started == value)
    except RuntimeError:  # tensors, which are no setting
        return False


def _damaged(path: Path) -> DiffsalError:
    return DiffsalError(f"{path}: is damaged and cannot be resumed; remove it to begin anew")


@contextmanager
def _log(
    out: Path, config: TrainingConfig, history: Sequence[Record]
) -> Iterator[Callable[[Record], None]]:
    """Logs that hold the finished epochs, and what adds a record to them."""
    finished = _finished(out / LOG, history)
    with replacing(out / LOG) as scratch:  # without what was logged of an unfinished epoch
        scratch.write_text("".join(finished), encoding="utf-8")
    board = _tensorboard(out, len(history)) if config.tensorboard else nullcontext()
    with board as writer:

        def log(record: Record) -> None:
            with writing(out / LOG), (out / LOG).open("a", encoding="utf-8") as file:
                file.write(_line(record))
            scores = ", ".join(f"{key} {record[key]:.4f}" for key in ("loss", "auroc", "accuracy"))
            tqdm.write(f"epoch {record['epoch']}/{config.epochs}: {scores}", file=sys.stderr)
            if writer is not None:
                for name, value in record.items():
                    writer.add_scalar(name, value, record["epoch"])

        yield log


def _finished(path: Path, history: Sequence[Record]) -> list[str]:
    """The lines of the finished epochs, with the seconds that the log alone knows."""
    logged = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    lines = []
    for record in history:
        start = _line(record).removesuffix("}\n") + ', "seconds": '
        whole = (line for line in logged if line.startswith(start) and line.endswith("}"))
        lines.append(next((f"{line}\n" for line in whole), _line(record)))
    return lines


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
