"""Data that can be read, but hardly be meant: told before any work is done with it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffsal.data.images import glance, read_image_with_notes, read_map
from diffsal.data.index import Sample
from diffsal.errors import DiffsalError

_LOOKED_AT = 32  # images, and human maps: spread over all
_MARKED = 0.95  # of a map's largest value, a mean from which on it marks everything
_SIDES = 1.05  # times another aspect ratio, where it is off by more than a pixel

One = TypeVar("One")


def oddities(samples: Sequence[Sample]) -> list[str]:
    """A sentence for each thing that is odd about some of the images or human maps.

    Of each, 32 are looked at: for images that use the lowest of 16 bits alone, and human maps of
    another aspect ratio than their images, or that mark everything. Files that cannot be read are
    passed over: whoever reads them says so.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.png")
        ...     Image.fromarray(np.full((2, 3), 255, np.uint8)).save(path)
        ...     oddities([Sample(path, 0, map=path)])
        ['1 of 1 human maps looked at mark the whole image: they say nothing (a.png)']
    """
    images = _spread([one.path for one in samples])
    pairs = _spread([(one.path, one.map) for one in samples if one.map is not None])
    dark = [path.name for path in images if _holds(_is_nearly_black, path)]
    oblong = [map_.name for path, map_ in pairs if _holds(_are_of_other_shapes, path, map_)]
    full = [map_.name for _, map_ in pairs if _holds(lambda one: _is_full(read_map(one)), map_)]
    grey = "use 4096 of 65536 levels of grey and are nearly black"
    return [*_told(dark, f"{len(images)} images looked at {grey}"), *_of_maps(oblong, full, pairs)]


def oddities_in_memory(
    samples: Sequence[Sample], look: Callable[[Sample], tuple[Sequence[int], NDArray[np.float32]]]
) -> list[str]:
    """A sentence for each thing that is odd about some human maps of a data set in memory.

    Args:
        samples: that have maps; 32 are looked at.
        look: gives an image's height and width, and its map (h, w), in [0, 1].

    Example:
        >>> import numpy as np
        >>> one = Sample(Path("image 7"), 0)
        >>> oddities_in_memory([one], lambda sample: ((2, 3), np.ones((2, 3), np.float32)))
        ['1 of 1 human maps looked at mark the whole image: they say nothing (image 7)']
    """
    pairs = [(one.path.name, *look(one)) for one in _spread(samples)]
    oblong = [name for name, size, map_ in pairs if _differ_in_shape(size, map_.shape)]
    full = [name for name, _, map_ in pairs if _is_full(map_)]
    return _of_maps(oblong, full, pairs)


def _of_maps(oblong: Sequence[str], full: Sequence[str], looked_at: Sequence[object]) -> list[str]:
    shape = "have another aspect ratio than their images and are taken to span them whole"
    return [
        *_told(oblong, f"{len(looked_at)} human maps looked at {shape}"),
        *_told(
            full, f"{len(looked_at)} human maps looked at mark the whole image: they say nothing"
        ),
    ]


def _told(found: Sequence[str], of_all: str) -> list[str]:
    if not found:
        return []
    more = ", …" if len(found) > 1 else ""
    return [f"{len(found)} of {of_all} ({found[0]}{more})"]


def _spread(all_of_them: Sequence[One]) -> list[One]:
    count = len(all_of_them)
    looked_at = min(count, _LOOKED_AT)
    return [all_of_them[at * count // looked_at] for at in range(looked_at)]


def _holds(is_odd: Callable[..., bool], *paths: Path) -> bool:
    try:
        return is_odd(*paths)
    except DiffsalError:
        return False


def _is_nearly_black(path: Path) -> bool:
    return glance(path).is_deep and bool(read_image_with_notes(path)[1])


def _are_of_other_shapes(path: Path, map_: Path) -> bool:
    return _differ_in_shape(glance(path).size, glance(map_).size)


def _differ_in_shape(image: Sequence[int], map_: Sequence[int]) -> bool:
    (height, width), (map_height, map_width) = image, map_
    off = abs(map_width - map_height * width / height), abs(map_height - map_width * height / width)
    ratio = map_width * height / (map_height * width)
    return max(ratio, 1 / ratio) > _SIDES and min(off) > 1


def _is_full(marked: NDArray[Any]) -> bool:
    largest = float(marked.max())
    return largest > 0 and float(marked.mean()) >= _MARKED * largest
