"""A state's tensors into a module: wrappers, old names, and the size of the last layer."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffsal.errors import DiffsalError, some_of
from diffsal.models.reading import COPIES, State

AUXILIARY_HEADS = ("AuxLogits.", "aux1.", "aux2.")
_OLD_NAMES = (
    # DenseNet before torchvision 0.3 and its published weights to this day; ViT before 0.14.
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)"), r"\1"),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)
_CRITERIA = re.compile(r"(^|[._])(criterion|loss|metrics?)([._]|$)", re.IGNORECASE)
PASS_ARCH = "pass --arch NAME (torchvision), timm:NAME or package.module:factory"


@contextmanager
def without_initialization() -> Iterator[None]:
    """Have modules made here without memory for their parameters, and so without random numbers.

    Unlike on the meta device as a whole, buffers and what is computed on the way are real. That
    suits all of torchvision's models; some of timm's compute buffers from parameters.

    Example:
        >>> with without_initialization():
        ...     layer = nn.Linear(3, 2)
        >>> layer.weight.shape, layer.weight.device
        (torch.Size([2, 3]), device(type='meta'))
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def name_prefixes(state: State, key: str) -> list[str]:
    """What wrappers have put before a model's key; before those of averaged copies of it last.

    Example:
        >>> state = dict.fromkeys(["ema.fc.weight", "module.fc.weight"], torch.ones(2, 2))
        >>> name_prefixes(state, "fc.weight")
        ['module.', 'ema.']
    """
    prefixes = [name.removesuffix(key) for name in state if f".{name}".endswith(f".{key}")]
    return sorted(prefixes, key=lambda prefix: COPIES.search(prefix) is not None)


def behind_each(state: State, prefixes: Collection[str]) -> dict[str, State]:
    """For each prefix the entries behind it, without it; all in one pass over the names.

    Example:
        >>> behind_each({"a.b.bias": torch.zeros(2)}, ["", "a.", "b."])
        {'': {'a.b.bias': tensor([0., 0.])}, 'a.': {'b.bias': tensor([0., 0.])}, 'b.': {}}
    """
    found: dict[str, State] = {prefix: {} for prefix in prefixes}
    for key, value in state.items():
        for cut in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
            if key[:cut] in found:
                found[key[:cut]][key[cut:]] = value
    return found


def strip_wrappers(state: State, model: nn.Module) -> tuple[State, list[str]]:
    """The entries behind the prefix that makes most of them the model's, and what to note.

    Raises:
        DiffsalError: layers stand beside them that decide, for all one knows.

    Example:
        >>> state = {"net.weight": torch.ones(2, 3), "net.bias": torch.zeros(2)}
        >>> strip_wrappers({**state, "steps": torch.tensor(3)}, nn.Linear(3, 2))[1]
        ['passed over what stands beside the model: steps']
    """
    names = model.state_dict().keys()
    prefixes = name_prefixes(state, next(iter(names)))
    inside = behind_each(state, prefixes)
    prefix = max(prefixes, key=lambda prefix: len(names & inside[prefix].keys()), default="")
    beside = [key for key in state if not key.startswith(prefix)]
    layers = [
        key
        for key in beside
        if key.endswith("weight")
        and state[key].ndim > 1
        and not COPIES.search(key)
        and not _CRITERIA.search(key)
    ]
    if layers:
        raise DiffsalError(
            f"beside the network {prefix.rstrip('.')!r} there are layers that it does not have "
            f"({some_of(layers)}): pass --arch package.module:factory that builds them too"
        )
    notes = [f"passed over what stands beside the model: {some_of(beside)}"] if beside else []
    return inside.get(prefix, dict(state)), notes


def current_names(state: State, model: nn.Module) -> State:
    """With torchvision's names of today, and without auxiliary heads if the model has none.

    Example:
        >>> list(current_names({"denselayer1.norm.1.bias": torch.zeros(2)}, nn.Identity()))
        ['denselayer1.norm1.bias']
    """
    own = model.state_dict()
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in _OLD_NAMES:
            key = pattern.sub(replacement, key)
        if key in own or not key.startswith(AUXILIARY_HEADS):
            renamed[key] = value
    return renamed


def input_channels(model: nn.Module) -> int:
    """3 or 1: of the first convolution, else of any other that takes images; 3 where none is.

    Raises:
        DiffsalError: no convolution takes an image's channels.

    Example:
        >>> input_channels(nn.Conv2d(1, 4, 3)), input_channels(nn.Linear(4, 2))
        (1, 3)
    """
    found = [one.in_channels for one in model.modules() if isinstance(one, nn.Conv2d)]
    for channels in (*found[:1], 3, 1):  # what is first may not be the first to run
        if channels in (1, 3) and (channels in found or not found):
            return channels
    raise DiffsalError(
        f"its first convolution takes {found[0]} channels, and images have 3, or 1 where grey: "
        "feed it in Python, diffsal.explain(model, images)"
    )


def fit_stem(model: nn.Module, state: State) -> None:
    """Give the model's first convolution as many input channels as the state's has.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3))
        >>> fit_stem(model, {"0.weight": torch.ones(4, 1, 3, 3)})
        >>> model[0]
        Conv2d(1, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = state.get(f"{name}.weight")
            if weight is not None and weight.ndim == 4 and module.groups == 1:
                module.in_channels = weight.shape[1]
                own = module.weight
                shape = (own.shape[0], weight.shape[1], *own.shape[2:])
                if own.shape != shape:
                    module.weight = nn.Parameter(own.detach().new_empty(shape))
            return


def fit_head(model: nn.Module, state: State) -> tuple[int, list[str]]:
    """Give the model's last layer the place and the number of outputs that the state's has.

    Returns:
        The number of outputs, and what to note.

    Raises:
        DiffsalError: there is no head, or names and shapes do not tell what it computes.

    Example:
        >>> model = nn.Sequential()
        >>> model.add_module("fc", nn.Linear(4, 1000))
        >>> fit_head(model, {"fc.1.weight": torch.ones(2, 4), "fc.1.bias": torch.zeros(2)})
        (2, ["taken as the head's last layer, with nothing but dropout before it: fc.1"])
    """
    last = last_layer(model)
    root = last.partition(".")[0]
    before = model.state_dict()
    own, found = (
        {key.rpartition(".")[0] for key in keys if key.startswith(f"{root}.")}
        for keys in (before, state)
    )
    if not found:
        raise DiffsalError(f"there is no classification head ({root}.weight): {PASS_ARCH}")
    place = _last_place(own, found, last)
    weight = state.get(f"{place}.weight")
    convolution = isinstance(model.get_submodule(last), nn.Conv2d)
    if (
        place is None
        or weight is None
        or weight.ndim != (4 if convolution else 2)
        or (convolution and not f"{place}.".startswith(f"{last}."))  # ReLU and pooling follow
    ):
        raise DiffsalError(
            f"the layers of its head ({some_of(sorted(found))}) do not tell what stands between "
            "them: pass --arch package.module:factory that builds it"
        )

    if own - found <= {last}:
        width = before[f"{last}.weight"].shape[1]
        _place(model, last, nn.Identity())
    else:  # one layer for the whole head
        width = next(v for k, v in before.items() if k.startswith(f"{root}.")).shape[-1]
        setattr(model, root, _flattening(model.get_submodule(root)))
    with without_initialization():
        make = partial(nn.Conv2d, kernel_size=1) if convolution else nn.Linear
        _place(model, place, make(width, len(weight), bias=f"{place}.bias" in state))
    note = f"taken as the head's last layer, with nothing but dropout before it: {place}"
    return len(weight), [] if place == last else [note]


def last_layer(model: nn.Module) -> str:
    """Name of the last module with parameters: in torchvision's classifiers, the last layer.

    Example:
        >>> last_layer(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Dropout()))
        '2'
    """
    return list(model.state_dict())[-1].rpartition(".")[0]


def _last_place(own: set[str], found: set[str], last: str) -> str | None:
    """Where the last layer is: the others must be where the family has them, or be none."""
    moved, gone = found - own, own - found
    if not moved and not gone:
        return last
    if len(moved) == 1 and gone == {last}:
        return min(moved)
    return min(found) if len(found) == 1 else None


def _flattening(head: nn.Module) -> nn.Sequential:
    """An empty head that flattens its input if the family's own head does."""
    flatten = nn.Sequential()
    if any(isinstance(module, nn.Flatten) for module in head.modules()):
        flatten.add_module("pool", nn.AdaptiveAvgPool2d(1))
        flatten.add_module("flatten", nn.Flatten())
    return flatten


def _place(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer at a dotted name; what is no container on the way becomes a Sequential."""
    parent = model
    *containers, leaf = name.split(".")
    taken = [part for part in name.split(".") if not part or hasattr(nn.Sequential, part)]
    if taken:  # torch's own, such as forward
        raise DiffsalError(
            f"{name}: no layer can be called {taken[0]!r}; pass --arch package.module:factory "
            "that builds the network, or rename its parameters"
        )
    for part in containers:
        child = parent._modules.get(part)
        if not isinstance(child, nn.Sequential):
            child = nn.Sequential()
            parent.add_module(part, child)
        parent = child
    parent.add_module(leaf, layer)


def assign(model: nn.Module, state: State, architecture: str) -> None:
    """Make the state's tensors the model's parameters and buffers, in the state's dtype.

    Args:
        model: changed in place.
        state: with the model's own names.
        architecture: for the messages.

    Raises:
        DiffsalError: names or shapes do not fit, or a value is not finite.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> assign(layer, {k: v.half() for k, v in layer.state_dict().items()}, "a layer")
        >>> layer.weight.dtype
        torch.float16
    """
    own = model.state_dict()
    problems = []
    if missing := [k for k in own if k not in state and not k.endswith("num_batches_tracked")]:
        problems.append(f"missing: {some_of(missing)}")
    if unexpected := [key for key in state if key not in own]:
        problems.append(f"unexpected: {some_of(unexpected)}")
    if differing := [k for k in own if k in state and not _fits(state[k], own[k])]:
        first = differing[0]
        problems.append(
            f"of another shape: {some_of(differing)} ({first} is {_shape(state[first])} in the "
            f"file, {_shape(own[first])} in the model)"
        )
    if problems:
        raise DiffsalError(
            f"the weights do not fit {architecture} ({'; '.join(problems)}): pass the --arch that "
            "they were saved from"
        )
    for key, value in state.items():
        if not _finite(value):
            raise DiffsalError(
                f"{key} holds NaN or infinite values: take a checkpoint from before it diverged"
            )
        if not own[key].is_floating_point():  # counts and indices, where all was made float16
            state[key] = value.to(own[key].dtype)
    own.update(state)  # keeps the versions of the modules' formats, which MNASNet insists on
    model.load_state_dict(own, assign=True)


def _fits(value: Tensor, own: Tensor) -> bool:
    return value.shape == own.shape and value.is_floating_point() >= own.is_floating_point()


def _shape(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    return bool(torch.stack(value.aminmax()).isfinite().all())  # an eighth of isfinite's time
