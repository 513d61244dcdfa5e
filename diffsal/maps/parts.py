"""A model's modules, without a walk over them where none came, went or changed its kind.

``nn.Module.modules()`` is recursive and slow, and is needed whenever maps are taken, as one that
was changed in between has to be noticed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import cast
from weakref import WeakKeyDictionary, ref

from torch import nn


@dataclass(frozen=True, eq=False)
class Walk:
    """What a walk over a model found. Weakly: a model held by what is known of it would never go.

    Attributes:
        modules: in the order of ``nn.Module.modules``.
        kinds: their types.
        children: what is registered in each of them, in turn.

    Example:
        >>> _, walk = modules_of(nn.Sequential(nn.Linear(2, 2)))
        >>> walk.kinds[1]
        <class 'torch.nn.modules.linear.Linear'>
    """

    modules: list["ref[nn.Module]"]
    kinds: list[type[nn.Module]]
    children: list["ref[nn.Module]"]


_REGISTERED, _VALUES = attrgetter("_modules"), methodcaller("values")
_WALKS: "WeakKeyDictionary[nn.Module, Walk]" = WeakKeyDictionary()


def modules_of(model: nn.Module) -> tuple[list[nn.Module], Walk]:
    """``list(model.modules())``, and the walk that found them: another one, if any changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> _, walk = modules_of(model)
        >>> modules_of(model)[1] is walk, modules_of(model.append(nn.ReLU()))[1] is walk
        (True, False)
    """
    known = _WALKS.get(model)
    if known is not None:
        before = [one() for one in known.modules]
        if [*map(type, before)] == known.kinds:  # none is gone
            modules = cast("list[nn.Module]", before)
            if _is_same(_children(modules), known.children):
                return modules, known
    modules = list(model.modules())
    children = [ref(child) for child in _children(modules)]
    _WALKS[model] = walk = Walk([*map(ref, modules)], [*map(type, modules)], children)
    return modules, walk


def _is_same(children: Sequence[nn.Module], known: Sequence["ref[nn.Module]"]) -> bool:
    return len(children) == len(known) and all(map(is_, children, [one() for one in known]))


def _children(modules: Sequence[nn.Module]) -> list[nn.Module]:
    registered = chain.from_iterable(map(_VALUES, filter(len, map(_REGISTERED, modules))))
    return [child for child in registered if child is not None]
