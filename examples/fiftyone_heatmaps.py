"""Difference maps as heatmaps of a FiftyOne data set, to be looked at in its app.

pip install fiftyone
python examples/fiftyone_heatmaps.py DATASET weights.pt

The project's tests give heatmaps to samples in memory, where fiftyone is installed. A data set
needs FiftyOne's MongoDB, too: `main` was not run in them.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import diffsal
from diffsal.data.preprocessing import Preprocessing
from diffsal.models.checkpoints import LoadedModel


def evidence(
    paths: Sequence[str], loaded: LoadedModel
) -> tuple[list[NDArray[np.float32]], list[float], float]:
    """Of each image the map (h, w) for class 1 against class 0 and the margin; the largest value.

    In logits, so that one scale, from minus to plus the largest value, compares all images.
    """
    prepare = loaded.preprocessing or Preprocessing()
    found = [diffsal.explain(loaded.model, prepare(one)[None], true=1, false=0) for one in paths]
    maps = [one.difference[0].numpy() for one in found]
    return maps, [float(one.margin) for one in found], max(float(abs(one).max()) for one in maps)


def add_heatmaps(samples: Sequence[Any], loaded: LoadedModel) -> None:
    """Give FiftyOne's samples the fields ``evidence``, a heatmap, and ``margin``."""
    import fiftyone as fo  # here, since importing it starts its database

    maps, margins, largest = evidence([sample.filepath for sample in samples], loaded)
    for sample, one, margin in zip(samples, maps, margins, strict=True):
        sample["evidence"] = fo.Heatmap(map=one, range=[-largest, largest])
        sample["margin"] = margin


def main(name: str, weights: str) -> None:
    """Of a data set that is there already; choose a diverging colour scale in the app."""
    import fiftyone as fo

    dataset = fo.load_dataset(name)
    samples = list(dataset)
    add_heatmaps(samples, diffsal.load_model(weights))
    for sample in samples:
        sample.save()
    fo.launch_app(dataset).wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
