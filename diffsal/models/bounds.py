"""How much a weights file may ask for, beside its own size: checked before it is given.

A small file can name the same bytes a thousand times, or a network that fills the memory."""

import math
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from diffsal.errors import DiffsalError

SPARE = 64 << 20
"""Bytes that tensors may take beyond four times the file's."""
_DTYPES = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8}
    | {torch.int8, torch.int16, torch.int32, torch.int64}
)
_MOST_VALUES, _DEEPEST, _LONGEST = 200_000, 32, 1_000
_LARGEST_NUMBER = 1_000_000  # ImageNet-22k has 21,841 classes; no layer is as wide
_MOST_NESTED = 100_000  # values in one tuple, those of tuples within it counted again
# A network that is built before its head is fitted: VGG's takes 120 million.
_SPARE_ELEMENTS, _SPARE_TENSORS = 200_000_000, 10_000
_PUTS = ("BINPUT", "LONG_BINPUT", "PUT")
_GETS = ("BINGET", "LONG_BINGET", "GET")
_ANEW = "save the weights anew, torch.save(model.state_dict(), 'weights.pt')"


def check_archive(members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse an archive that unpacks to more than it is: torch packs nothing.

    Args:
        members: of the archive.
        size: of its file, in bytes.

    Raises:
        DiffsalError: it would.

    Example:
        >>> member = zipfile.ZipInfo("archive/data/0")
        >>> member.file_size = 6_000_000_000
        >>> check_archive([member], 7_000_000)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: unpacks from 7 MB to 6000 MB, and torch packs nothing: save ...
    """
    unpacked = sum(member.file_size for member in members)
    if unpacked > size:
        raise DiffsalError(
            f"unpacks from {size / 1e6:.0f} MB to {unpacked / 1e6:.0f} MB, and torch packs "
            f"nothing: {_ANEW}"
        )


def check_pickle(file: IO[bytes]) -> None:
    """Refuse a pickle whose loading alone would take ages; nothing of it is made.

    Hashing a tuple takes as long as it is with all that lies in it, which sharing doubles with each
    level; and a bytearray can be asked for by its length.

    Args:
        file: at the beginning of the pickle; read to its end.

    Raises:
        DiffsalError: it would.

    Example:
        >>> import io, pickle
        >>> nested = ()
        >>> for _ in range(40):
        ...     nested = (nested, nested)
        >>> check_pickle(io.BytesIO(pickle.dumps(nested)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: holds tuples in tuples, of more than 100000 values: save ...
    """
    stack: list[int] = []  # of each value: how many it is with all that lies in it, if a tuple
    marks: list[int] = []
    memo: dict[object, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "MARK":
            marks.append(len(stack))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode.name in _PUTS:
            memo[argument] = stack[-1]
        elif opcode.name in _GETS:
            stack.append(memo[argument])
        else:
            if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
                raise DiffsalError(f"holds a bytearray: {_ANEW}")
            taken = _taken(opcode, stack, marks)
            size = 1 + sum(taken) if opcode.name.startswith("TUPLE") else 1
            if size > _MOST_NESTED:
                raise DiffsalError(
                    f"holds tuples in tuples, of more than {_MOST_NESTED} values: {_ANEW}"
                )
            stack += [size] * len(opcode.stack_after)


def _taken(opcode: pickletools.OpcodeInfo, stack: list[int], marks: list[int]) -> list[int]:
    """What an opcode takes from the stack."""
    before = list(opcode.stack_before)
    start = len(stack) - len(before)
    if pickletools.markobject in before:
        start = marks.pop() - before.index(pickletools.markobject)
    taken = stack[start:]
    del stack[start:]
    return taken


def check_plain(name: str, value: Any) -> None:
    """Refuse an entry that is not of plain values, or of too many, before it is shown or compared.

    Args:
        name: of the entry, for the message.
        value: numbers, strings, booleans, None, lists and tuples of these, and dicts under names.

    Raises:
        DiffsalError: it is something else, or more than 200,000 values, 32 levels deep.

    Example:
        >>> check_plain("classes", ["cat", 10**400])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: classes: holds a number of 1329 bits: write the checkpoint ...
    """
    left = _MOST_VALUES
    ahead = [(value, 0)]
    while ahead:
        one, depth = ahead.pop()
        left -= 1
        inside: list[Any] = []
        problem = ""
        if isinstance(one, dict):
            inside = [*one, *one.values()]
            problem = (
                "" if all(isinstance(key, str) for key in one) else "has a key that is no text"
            )
        elif isinstance(one, list | tuple):
            inside = list(one)
        else:
            problem = _not_plain(one)
        left -= len(one) // _LONGEST if isinstance(one, str) else 0
        if left < len(ahead) + len(inside) or depth > _DEEPEST:
            problem = f"holds more than {_MOST_VALUES} values, or {_DEEPEST} levels of them"
        if problem:
            raise DiffsalError(f"{name}: {problem}: write the checkpoint with save_checkpoint")
        ahead += [(part, depth + 1) for part in inside]


def _not_plain(one: Any) -> str:
    if isinstance(one, bool | float | str | None):
        return ""
    if isinstance(one, int):
        return f"holds a number of {one.bit_length()} bits" if one.bit_length() > 63 else ""
    return f"holds a {type(one).__name__}"


def check_numbers(architecture: str, arguments: Any) -> None:
    """Refuse arguments by which a constructor would count to more than a million.

    Args:
        architecture: for the message.
        arguments: plain, see `check_plain`.

    Raises:
        DiffsalError: a number, or a list's numbers together, is larger.

    Example:
        >>> check_numbers("timm:resnet18", {"layers": [1, 10_000_000]})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: asks for timm:resnet18 with 10000001: a network of that size...
    """
    ahead = [arguments]
    while ahead:
        one = ahead.pop()
        inside = list(one.values()) if isinstance(one, dict) else one
        if isinstance(inside, list | tuple):
            numbers = [abs(part) for part in inside if isinstance(part, int)]
            count = max(numbers, default=0) if isinstance(one, dict) else sum(numbers)
            if count > _LARGEST_NUMBER:
                raise DiffsalError(
                    f"asks for {architecture} with {count}: a network of that size is built in "
                    "Python alone, diffsal.explain(model, images)"
                )
            ahead += inside


def check_tensors(state: dict[str, Tensor], size: int) -> None:
    """Refuse tensors that are not plain numbers, or take far more memory than the file has bytes.

    Args:
        state: the weights.
        size: of the file, in bytes.

    Raises:
        DiffsalError: a tensor has no memory or values, is sparse, nested, quantised, or of a type
            that does not compute on the CPU; or all take more than four times the file.

    Example:
        >>> check_tensors({"fc.weight": torch.empty(2, 2, device="meta")}, 1_000)
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: fc.weight is on the meta device: save plain tensors on the CPU
    """
    for key, tensor in state.items():
        if len(key) > _LONGEST:
            raise DiffsalError(f"the name {key[:20]}… has {len(key)} characters: rename it")
        if problem := _not_numbers(tensor):
            raise DiffsalError(f"{key} is {problem}: save plain tensors on the CPU")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if needed > 4 * size + SPARE:
        raise DiffsalError(
            f"its tensors take {needed / 1e6:.0f} MB, of a file of {size / 1e6:.1f} MB: some are "
            "expanded; save them with .clone()"
        )


def _not_numbers(tensor: Tensor) -> str:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized:
        return "quantised"
    if tensor.device.type != "cpu":
        return f"on the {tensor.device.type} device"
    return "" if tensor.dtype in _DTYPES else str(tensor.dtype).removeprefix("torch.")


@contextmanager
def building_for(state: dict[str, Tensor]) -> Iterator[None]:
    """Refuse to make tensors here, once they are far more than the state that they are for.

    Sizes are known before memory is taken.

    Args:
        state: the weights that the network is built for.

    Raises:
        DiffsalError: more than twice as many elements, and 200 million; or more than four times as
            many tensors, and 10,000.

    Example:
        >>> with building_for({}):
        ...     layer = nn.Linear(100_000, 100_000)
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: its architecture is far larger than the weights: name it by ...
    """
    with _Budget(
        2 * sum(tensor.numel() for tensor in state.values()) + _SPARE_ELEMENTS,
        4 * len(state) + _SPARE_TENSORS,
    ):
        yield


_aten = torch.ops.aten
_BY_SIZE = (_aten.empty.memory_format, _aten.zeros.default, _aten.ones.default)
_OF_ONE = (_aten.detach.default, _aten.lift_fresh.default)


class _Budget(TorchDispatchMode):
    """Counts what is made before it is made, on the meta device, which has no memory."""

    def __init__(self, elements: int, tensors: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements, self.tensors = elements, tensors

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = self._made(func, args, kwargs)
        if made is not None:
            self.tensors -= 1
            self.elements -= made
            if self.elements < 0 or self.tensors < 0:
                raise DiffsalError(
                    "its architecture is far larger than the weights: name it by --arch"
                )
        return func(*args, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> int | None:
        """How many elements a new tensor will have; None where there is none, or who knows."""
        if func in _BY_SIZE:  # most are, and what follows takes longer
            return int(math.prod(args[0]))
        to_meta = str(kwargs.get("device")) == "meta"
        if to_meta or func in _OF_ONE or func.is_view or func._schema.is_mutable:
            return None
        placed = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
        try:
            args, placed = tree_map_only(Tensor, lambda one: one.to("meta"), (args, placed))
            result = func(*args, **placed)
        except Exception:  # it needs values, and gives one number
            return None
        return result.numel() if isinstance(result, Tensor) else None
