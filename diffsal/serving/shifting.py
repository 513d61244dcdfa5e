"""The head-shift on one image, by degrees: the class maps lie, and nothing that decides changes."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.explaining.overlays import PALE, SIGNED, Layer, drawn_size, own_layer
from diffsal.fooling.head_shift import head_shift
from diffsal.maps.caveats import is_coarse
from diffsal.maps.contrast import Choice
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import in_copy
from diffsal.serving.explained import Picture, Served, maps_of, on_device
from diffsal.serving.pictures import SMALL, for_screen, layer_over

TARGETS = ("edges", "corner", "middle")
"""What class maps can be made to show, see :func:`diffsal.fooling.targets.target_map`."""

VIEWS = 18
"""Of an image, to fit a head-shift to."""

_MOVED_BY = 8  # a view is moved by so much of the input's side
_BATCH = 6  # views in one forward pass


@dataclass(frozen=True, eq=False)
class Shift:
    """A head-shift at full strength.

    Attributes:
        target: what the class maps are made to show.
        changes: by a parameter's name, what is added to it, float64 on the CPU; of the weight (K,
            C) every row is the same, of the bias (K,) every entry.
    """

    target: str
    changes: Mapping[str, Tensor]


def views_of(tensor: Tensor) -> Tensor:
    """(18, C, H, W): an input (C, H, W) moved by an eighth in all directions, and mirrored.

    What moves in at an edge is the edge's own row or column of pixels.

    Example:
        >>> views = views_of(torch.rand(3, 16, 16))
        >>> len(views) == VIEWS, len(torch.unique(views, dim=0))
        (True, 18)
    """
    height, width = tensor.shape[1:]
    by = max(1, height // _MOVED_BY), max(1, width // _MOVED_BY)
    padded = F.pad(tensor[None], (by[1], by[1], by[0], by[0]), mode="replicate")[0]
    moved = [
        padded[:, top : top + height, left : left + width]
        for top in (0, by[0], 2 * by[0])
        for left in (0, by[1], 2 * by[1])
    ]
    return torch.stack([*moved, *(one.flip(2) for one in moved)])


def fit_shift(served: Served, picture: Picture, target: str = "edges") -> Shift:
    """Fit a head-shift to one image's views; a quarter of them, itself among these, only judge.

    Raises:
        DiffsalError: another target; see :func:`diffsal.fooling.head_shift.head_shift`.
    """
    if target not in TARGETS:
        raise DiffsalError(f"the target {target!r} is unknown: pass one of {', '.join(TARGETS)}")
    views = on_device(served, list(views_of(picture.tensor)))
    found = head_shift(served.model, views.split(_BATCH), target, target_layer=served.layer)
    own, fooled = served.model.state_dict(), found.model.state_dict()
    changes = {
        name: (fooled[name].double() - value.double()).cpu()
        for name, value in own.items()
        if not torch.equal(fooled[name], value)
    }
    return Shift(target, changes)


def shifted(model: nn.Module, shift: Shift, strength: float) -> nn.Module:
    """A copy of a model, a part of the way to its head-shift; it shares all other parameters.

    Any part of the way is a head-shift itself: what is added is the same for every row.

    Args:
        model: the shift was fitted to; left untouched.
        shift: at full strength.
        strength: 0 is the model itself, 1 the whole shift.

    Raises:
        DiffsalError: a strength outside [0, 1].

    Example:
        >>> model = nn.Linear(3, 2)
        >>> shift = Shift("edges", {"bias": torch.tensor([4.0, 4.0]).double()})
        >>> half = shifted(model, shift, 0.5)
        >>> torch.allclose(half.bias - model.bias, torch.tensor(2.0)), half.weight is model.weight
        (True, True)
    """
    if not 0 <= strength <= 1:
        raise DiffsalError(f"a strength of {strength} is none: pass a number from 0 to 1")
    shared = {id(one): one for one in chain(model.parameters(), model.buffers())}
    copy = deepcopy(model, shared)
    for path, change in shift.changes.items():
        place, _, name = path.rpartition(".")
        module = copy.get_submodule(place)
        own = getattr(module, name).detach()
        moved = own.double() + strength * change.to(own.device)
        setattr(module, name, nn.Parameter(moved.to(own.dtype), requires_grad=False))
    return copy


def shifted_maps(
    served: Served,
    picture: Picture,
    shift: Shift,
    strength: float,
    true: Choice = None,
    false: Choice = None,
) -> SalienceMaps:
    """Maps (1, h, w) of the shifted copy, on the CPU.

    Raises:
        DiffsalError: see :func:`shifted` and :func:`diffsal.serving.explained.maps_of`.
    """
    copy = shifted(served.model, shift, strength)
    return maps_of(served, [picture.tensor], true, false, copy, in_copy(copy, served.layer))


def lie(
    served: Served,
    picture: Picture,
    shift: Shift,
    strength: float,
    true: Choice = None,
    false: Choice = None,
) -> dict[str, Any]:
    """What the page shows of a model that is shifted so far, as plain JSON types.

    Returns:
        ``layers`` of the shifted model: ``true``, ``false`` and ``difference``, the last on the
        honest one's scale; ``probabilities`` and ``margin`` (in logits), each ``before`` and
        ``now``; ``changed``: by how much at most the probabilities, the cells of the difference
        and those of the true class's map moved; ``common_mode_share``, ``before`` and ``now``.

    Raises:
        DiffsalError: see :func:`shifted_maps`.
    """
    before = maps_of(served, [picture.tensor], true, false)
    true_class = int(before.true_class)  # where two classes are even, rounding may turn the lead
    now = shifted_maps(served, picture, shift, strength, true_class, false)

    def most(one: Tensor, other: Tensor) -> float:
        return float((one.double() - other.double()).abs().max())

    return {
        "strength": strength,
        "target": shift.target,
        "layers": _layers(served, picture, before, now),
        "probabilities": {
            "before": before.probabilities[0].tolist(),
            "now": now.probabilities[0].tolist(),
        },
        "margin": {"before": float(before.margin), "now": float(now.margin)},
        "changed": {
            "probability": most(before.probabilities, now.probabilities),
            "difference": most(before.difference, now.difference),
            "true": most(before.true, now.true),
        },
        "common_mode_share": {
            "before": _known(float(before.common_mode_share)),
            "now": _known(float(now.common_mode_share)),
        },
    }


def _known(share: float) -> float | None:
    return None if share != share else share


def _layers(
    served: Served, picture: Picture, before: SalienceMaps, now: SalienceMaps
) -> dict[str, Any]:
    raw = torch.cat([now.true, now.false, now.difference])
    size = drawn_size(*picture.size)
    placed = served.preprocessing.place(raw, size, is_coarse(raw.shape)).numpy()
    limit = float(before.difference.abs().max()) or 1.0
    image = for_screen(picture.image, SMALL)
    return {
        "true": layer_over(image, own_layer(placed[0])),
        "false": layer_over(image, own_layer(placed[1])),
        "difference": layer_over(image, Layer(placed[2], -limit, limit, SIGNED, PALE)),
    }
