"""Maps of a volume by a MONAI network: (B, C, D, H, W) in, maps (B, d, h, w) out.

pip install monai
python examples/monai_volumes.py

The network is small and random; yours is ``DenseNet121(spatial_dims=3, ...)`` with its weights.
"""

import torch
from monai.networks.nets import DenseNet
from torch import Tensor, nn

import diffsal


def network() -> nn.Module:
    """A DenseNet of volumes and two classes."""
    torch.manual_seed(0)
    model: nn.Module = DenseNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        init_features=8,
        growth_rate=8,
        block_config=(2, 2),
    )
    return model.eval()


def main(volumes: Tensor | None = None) -> diffsal.SalienceMaps:
    """Explain two volumes, and say in which slices the evidence lies."""
    model = network()
    if volumes is None:
        volumes = torch.rand(2, 1, 32, 48, 48)
    maps = diffsal.explain(model, volumes, true=1, false=0)
    whole = maps.resized(volumes.shape[2:]).difference  # voxel by voxel, for a viewer
    print(f"maps {tuple(maps.difference.shape)}, interpolated {tuple(whole.shape)}")
    for number, one in enumerate(maps.difference):
        slices = ", ".join(f"{value:+.4f}" for value in one.sum((1, 2)).tolist())
        print(f"volume {number}: {slices}: of {maps.margin[number]:+.4f} logits")
    return maps


if __name__ == "__main__":
    main()
