"""A grad-cam script with one line changed: ``DifferenceCAM`` for ``GradCAM``.

python examples/drop_in.py image.png weights.pt heatmap.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pytorch_grad_cam.utils.image import show_cam_on_image

from diffsal import DifferenceCAM, load_model
from diffsal.data.images import read_image
from diffsal.data.preprocessing import Preprocessing


def main(image_path: Path, weights_path: Path, heatmap_path: Path) -> None:
    """Draw the difference of the predicted class and its opposite over the image."""
    loaded = load_model(weights_path)
    preprocessing = loaded.preprocessing or Preprocessing()
    image = preprocessing.resized(read_image(image_path))
    inputs = preprocessing(image)[None]

    with DifferenceCAM(loaded.model, [loaded.target_layer.module]) as cam:  # was: GradCAM(...)
        heatmap = cam(input_tensor=inputs, targets=None)[0]

    overlay = show_cam_on_image(image.astype(np.float32) / 255, heatmap, use_rgb=True)
    Image.fromarray(overlay).save(heatmap_path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
