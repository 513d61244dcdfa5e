"""Images and an index for whatever is attacked."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_index(folder: Path) -> None:
    """16 noisy images, bright at the top or at the bottom, with human maps; 8 are for training."""
    draw = np.random.default_rng(0)
    lines = ["path,label,map,split"]
    for number in range(16):
        bright = np.zeros((32, 32), np.uint8)
        bright[slice(16) if number % 2 else slice(16, None)] = 255
        noise = draw.integers(0, 160, (32, 32), np.uint8)
        Image.fromarray(noise + bright // 4).save(folder / f"{number}.png")
        Image.fromarray(bright).save(folder / f"map{number}.png")
        split = "train" if number < 8 else "val" if number < 12 else "test"
        lines.append(f"{number}.png,{('bottom', 'top')[number % 2]},map{number}.png,{split}")
    (folder / "index.csv").write_text("\n".join(lines))
