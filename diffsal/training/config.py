"""How a model is trained: names, values and what is refused."""

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from inspect import signature
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from torchvision.transforms import v2

from diffsal.data.datasets import AUGMENTATIONS
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError
from diffsal.system.files import read_text
from diffsal.training.dynamic_alpha import DynamicAlphaLoss
from diffsal.training.human_maps import Pool
from diffsal.training.losses import LOSSES, MapOf, SalienceLoss

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


Schedule: TypeAlias = Literal["none", "step", "cosine"]
Select: TypeAlias = Literal["last", "best-auroc", "best-accuracy"]
Amp: TypeAlias = Literal["none", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    The defaults are the paper's (DenseNet-121 with ImageNet weights, 224², SGD, learning rate
    0.002, 50 epochs) and, where it is silent, those of the published CYBORG script of its authors
    (momentum, weight decay, schedule, batch size).

    Attributes:
        method: a name in :data:`diffsal.training.losses.LOSSES`.
        alpha: weight of the cross-entropy; ``None``: the paper's for the method, as for the others.
        beta: weight of the term with the human map.
        gamma: weight of the third term.
        dynamic_alpha: weigh cross-entropy and salience by their sizes, see
            :class:`diffsal.training.dynamic_alpha.DynamicAlphaLoss`; then ``alpha`` has no use.
        map_of: of ``baseline``: ``label`` (the paper's) or ``predicted``; ``None``: the method's.
        pool: how human maps come to the size of the model's: ``area`` or ``max``.
        architecture: see :func:`diffsal.models.architectures.build_model`; ``None``: what the
            weights file says, else ``densenet121``.
        arguments: of the architecture's constructor. torchvision's and timm's need no
            ``num_classes``; 1 makes a model of one logit.
        weights: ``none``; a name of published ones, which is upper case, as ``DEFAULT``; or else a
            file, whose last layer is used where it tells as many classes apart, and is drawn anew,
            as torch does, where not.
        target_layer: dotted name; ``None``: it is found.
        size: height and width of the input, in pixels.
        resize: ``squash`` or ``crop``, see :class:`diffsal.data.preprocessing.Preprocessing`.
        mean: of the colours; ``None``: what the weights file says, else ImageNet's.
        std: likewise.
        augment: names in :data:`diffsal.data.datasets.AUGMENTATIONS`.
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
        device: see :func:`diffsal.system.devices.choose_device`.
        workers: processes that read images; 0: none but this one.
        tensorboard: write the log for TensorBoard too.

    Raises:
        DiffsalError: a value that cannot be used; names the key.

    Example:
        >>> TrainingConfig(method="baseline", alpha=0.1).criterion()
        BaselineSalienceLoss(cross_entropy=0.1, true=0.5)
        >>> TrainingConfig(epochs=0)
        Traceback (most recent call last):
        ...
        diffsal.errors.DiffsalError: training: epochs must be from 1 to 2.14748e+09, not 0
    """

    method: str = "contrast"
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    dynamic_alpha: bool = False
    map_of: MapOf | None = None
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
        if not _is_plain(self.arguments):
            raise _bad_value(
                "arguments", self.arguments, "texts and finite numbers, or lists of them"
            )
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

        Example:
            >>> TrainingConfig.from_dict({"epoch": 3})
            Traceback (most recent call last):
            ...
            diffsal.errors.DiffsalError: training: the key 'epoch' is unknown; near: epochs
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
            DiffsalError: a weight that the method does not have, or has no use for.
        """
        given = {name: getattr(self, name) for name in ("alpha", "beta", "gamma", "map_of", "pool")}
        options = {name: value for name, value in given.items() if value is not None}
        if self.method == "cross-entropy":
            del options["pool"]  # it has no maps to pool
        loss = LOSSES[self.method]
        for name in options:
            if name not in signature(loss).parameters:
                raise DiffsalError(f"training: {self.method} has no {name}; leave it out")
        if not self.dynamic_alpha:
            return loss(**options)
        if self.alpha is not None:
            raise DiffsalError("training: dynamic_alpha sets alpha at every step; leave out one")
        return DynamicAlphaLoss(loss(**options))

    def preprocessing(self, base: Preprocessing | None = None) -> Preprocessing:
        """Of the model's input; mean and std are those of ``base`` where they are not given."""
        base = base or Preprocessing()
        mean, std = self.mean or base.mean, self.std or base.std
        return Preprocessing((self.size, self.size), self.resize, mean, std, base.channels)

    def augmentation(self) -> v2.Transform | None:
        """Of the training samples, for :class:`diffsal.data.datasets.ImageDataset`."""
        chosen = [AUGMENTATIONS[name]() for name in self.augment]
        return v2.Compose(chosen) if chosen else None


def read_toml(path: str | Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        DiffsalError: it cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "training.toml").write_text("method = 'contrast'")
        ...     read_toml(Path(folder, "training.toml"))
        {'method': 'contrast'}
    """
    try:
        content: dict[str, Any] = tomllib.loads(read_text(Path(path)))
    except DiffsalError as error:
        raise DiffsalError(f"{path}: {error}") from error
    except OSError as error:
        raise DiffsalError(f"{path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
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
    if origin in (Union, UnionType):  # the first of a Literal and another
        return any(_is_of(value, one) for one in arguments)
    if origin is tuple and isinstance(value, tuple):
        kinds = arguments[:1] * len(value) if Ellipsis in arguments else arguments
        return len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if kind is Any:
        return True
    return type(value) in ((int, float) if kind is float else (origin or kind,))


def _is_plain(value: Any) -> bool:
    """Whether checkpoints and results can hold it: a date, say, they cannot."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(one) for name, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return (
        value is None or isinstance(value, str | int) or (type(value) is float and isfinite(value))
    )


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is Union:
        return _words(get_args(kind)[0])
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _bad_value(name: str, value: Any, wanted: str) -> DiffsalError:
    return DiffsalError(f"training: {name} must be {wanted}, not {value!r}")
