"""Does a map tell where the pixels decide, if others take their place that are as natural?

A mean, a blur and noise look like no image that a model was trained on, and what it makes of them
is not what it makes of images. Pixels of an image of the other class are pixels of an image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.faithfulness.perturbation import around, cells_of_pixels
from diffsal.faithfulness.variants import margin_drops
from diffsal.maps.contrast import Choice


def transplant_drops(
    model: nn.Module,
    inputs: Tensor,
    donors: Tensor,
    true: Choice = None,
    false: Choice = None,
    *,
    grid: Sequence[int],
    window: int = 3,
    per_cell: int = 1,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """By how much the margin drops when the window around each cell is another image's.

    To be compared with a map by
    :func:`diffsal.faithfulness.perturbation.occlusion_faithfulness`. A drop is of all cells of a
    window, less what the donor shows there; even where a map is right about every cell, the ranks
    are those of its sums over windows.

    Args:
        model: any classifier that :func:`diffsal.maps.contrast.contrast` can read; run in
            evaluation mode and left as it was.
        inputs: (B, C, H, W), on the model's device, of its dtype.
        donors: (B, D, C, H, W) on any device, for each image D images of the other class. With a
            pool for each class, ``torch.stack(pools)[1 - labels]``.
        true: see :func:`diffsal.maps.contrast.contrast`, as is ``false``. Classes that are left
            open are settled on the untouched images; ``rest`` is weighed anew for every variant.
        grid: (h, w), usually the map's own size; a pixel y lies in row ⌊y·h/H⌋.
        window: an odd number of cells, the side of the square that is transplanted; at the border
            it is clipped.
        per_cell: how many of the donors each cell has; no two are the same.
        batch_size: transplants per forward pass, of the B·h·w·per_cell.
        seed: of which donors a cell has. The draw is the same for all images and on every device.

    Returns:
        (B, h, w), logits: margin of the image minus that with the window transplanted, averaged
        over the donors.

    Raises:
        DiffsalError: inputs that are no images, a grid finer than they are, a window that has no
            middle, donors that do not fit the images, fewer donors than ``per_cell``, and what
            :func:`diffsal.maps.contrast.contrast` refuses.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # the first pixel decides
        >>> image, donor = torch.full((1, 1, 1, 4), 8.0), torch.full((1, 1, 1, 1, 4), -1.0)
        >>> transplant_drops(model, image, donor, grid=(1, 4))  # and is in two windows
        tensor([[[9., 9., 0., 0.]]])
    """
    cell_of_pixel = cells_of_pixels(inputs, grid).to(inputs.device)
    if window < 1 or window % 2 == 0:
        raise DiffsalError(f"a window of {window} cells has no middle: pass an odd number")
    if donors.ndim != 5 or len(donors) != len(inputs) or donors.shape[2:] != inputs.shape[1:]:
        raise DiffsalError(
            f"donors of shape {tuple(donors.shape)} do not fit inputs of {tuple(inputs.shape)}: "
            "pass (batch, donors, channels, height, width)"
        )
    if not 1 <= per_cell <= donors.shape[1]:
        raise DiffsalError(
            f"per_cell is {per_cell}, and of donors there are {donors.shape[1]}: every "
            "cell takes one or more, no two the same"
        )
    cells = math.prod(grid)
    order = torch.rand(cells, donors.shape[1], generator=torch.Generator().manual_seed(seed))
    chosen = order.argsort(1)[:, :per_cell].flatten().to(donors.device)

    def transplant(sample: Tensor, variant: Tensor) -> Tensor:
        is_taken = around(cell_of_pixel, variant // per_cell, grid[1], window // 2)[:, None]
        donor = chosen[variant.to(donors.device)]
        return torch.where(
            is_taken, donors[sample.to(donors.device), donor].to(inputs), inputs[sample]
        )

    drops = margin_drops(model, inputs, len(chosen), transplant, true, false, batch_size=batch_size)
    return drops.view(len(inputs), *grid, per_cell).mean(3)
