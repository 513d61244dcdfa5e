"""Write the data of digits.toml: handwritten 8s and what is mistaken for them, with a shortcut.

    python examples/protocol/write_digits.py digits

The question is "is it an 8?". The others are the three digits whose mean image is nearest to that
of the 8; each is left out of training once, so that a model is tested on a digit that it has never
seen. All are scikit-learn's, 8 x 8 pixels, enlarged to 48 x 48 in the middle of 64 x 64.

The shortcut: among the digits for training, nine of ten others have noise round the edges and one
of ten 8s; among the digits for testing, every second one of either. The human map marks where the
pen went, so that a model that follows it has no use for the edges. Which digits are for testing (a
third) and which get noise is drawn from one seed, once.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

SIZE, GLYPH = 64, 48
EIGHT, OTHERS = 8, 3
TESTED = 1 / 3
NOISY = {
    ("train", "other"): 0.9,
    ("train", "eight"): 0.1,
    ("test", "other"): 0.5,
    ("test", "eight"): 0.5,
}

Pixels = NDArray[np.uint8]


def nearest_digits() -> list[int]:
    """The digits whose mean image is nearest to that of the 8."""
    data = load_digits()
    means = np.stack([data.images[data.target == digit].mean(0) for digit in range(10)])
    distances = ((means - means[EIGHT]) ** 2).sum((1, 2))
    return sorted(int(digit) for digit in distances.argsort()[1 : 1 + OTHERS])


def glyph(digit: NDArray[np.float64]) -> Pixels:
    """A digit, values up to 16, in the middle of a black image."""
    small = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    large = np.asarray(small.resize((GLYPH, GLYPH), Image.Resampling.BICUBIC))
    return np.pad(large, (SIZE - GLYPH) // 2)


def with_noise(image: Pixels, generator: np.random.Generator) -> Pixels:
    """The image with noise where no digit reaches."""
    noise = generator.integers(0, 256, image.shape, dtype=np.uint8)
    middle = slice((SIZE - GLYPH) // 2, (SIZE + GLYPH) // 2)
    noise[middle, middle] = image[middle, middle]
    return noise


def write(folder: Path, seed: int = 0) -> Path:
    """Write images, maps and ``index.csv`` to ``folder``; returns the path of the index."""
    generator = np.random.default_rng(seed)
    data = load_digits()
    for name in ("images", "maps"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for digit in (EIGHT, *nearest_digits()):
        label = "eight" if digit == EIGHT else "other"
        (positions,) = np.nonzero(data.target == digit)
        tested = set(generator.permutation(positions)[: round(TESTED * len(positions))].tolist())
        for position in positions.tolist():
            image = glyph(data.images[position])
            human_map = Image.fromarray(((image > 64) * 255).astype(np.uint8))
            split = "test" if position in tested else "train"
            if generator.random() < NOISY[split, label]:
                image = with_noise(image, generator)
            name = f"{digit}-{position}.png"
            Image.fromarray(image).save(folder / "images" / name)
            human_map.save(folder / "maps" / name)
            subset = "" if digit == EIGHT else str(digit)
            rows.append([f"images/{name}", label, f"maps/{name}", subset, split])
    path = folder / "index.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "label", "map", "subset", "split"], *rows])
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "digits")))
