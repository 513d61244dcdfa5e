"""What maps cost: beside the model's own forward pass, and beside other libraries' maps.

    python benchmarks/maps.py [--device cuda] [--batch 1 8 64 256] [--models resnet50 vit_b_16]

Libraries that make one class's map at a time are called for both classes, as their users have to.
Each has a copy of the model of its own, so that no hook of one slows another. What a library raises
on a model is no entry. The other libraries: `pip install captum 'diffsal[zoo]'`.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from timing import Row, clock_of, in_turns, printed, ratios, row
from torch import Tensor, nn
from torchvision.models import get_model

from diffsal import DifferenceCAM
from diffsal.maps.target_layers import TargetLayer

MODELS = ("resnet50", "densenet121", "convnext_tiny", "vit_b_16")
SIZE = 224
Make: TypeAlias = Callable[[nn.Module, Tensor, TargetLayer], Callable[[], object]]


def grad_cam(kind: str) -> Make:
    """A class of grad-cam, whose maps are arrays of the input's size."""

    def make(model: nn.Module, inputs: Tensor, layer: TargetLayer) -> Callable[[], object]:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        theirs = getattr(pytorch_grad_cam, kind)(model, [layer.module], layer.reshape)
        targets = [[ClassifierOutputTarget(label)] * len(inputs) for label in (0, 1)]
        return lambda: [theirs(inputs, target) for target in targets]

    return make


def grad_cam_finer(model: nn.Module, inputs: Tensor, layer: TargetLayer) -> Callable[[], object]:
    """Its own difference of classes."""
    from pytorch_grad_cam import FinerCAM

    theirs = FinerCAM(model, [layer.module], layer.reshape)
    return lambda: theirs(inputs, None, comparison_categories=[1])


def torch_cam(kind: str) -> Make:
    """A class of torch-cam, whose maps stay on the device."""

    def make(model: nn.Module, inputs: Tensor, layer: TargetLayer) -> Callable[[], object]:
        from torchcam import methods

        theirs = getattr(methods, kind)(model, layer.module)

        def both() -> list[Any]:
            scores = model(inputs)
            again = {} if kind == "CAM" else {"retain_graph": True}
            return [theirs([label] * len(inputs), scores, **again) for label in (0, 1)]

        return both

    return make


def captum(model: nn.Module, inputs: Tensor, layer: TargetLayer) -> Callable[[], object]:
    """Captum's LayerGradCam, on the device."""
    from captum.attr import LayerGradCam

    theirs = LayerGradCam(model, layer.module)
    return lambda: [theirs.attribute(inputs, target=label) for label in (0, 1)]


def monai(model: nn.Module, inputs: Tensor, layer: TargetLayer) -> Callable[[], object]:
    """MONAI's GradCAM, at the input's size on the device."""
    from monai.visualize import GradCAM

    theirs = GradCAM(nn_module=model, target_layers=layer.name)
    return lambda: [theirs(x=inputs, class_idx=[label] * len(inputs)) for label in (0, 1)]


OURS: dict[str, Callable[[DifferenceCAM, Tensor], object]] = {
    "cam.maps: both classes and the difference": lambda cam, inputs: cam.maps(inputs),
    "cam(...): heatmaps as numpy": lambda cam, inputs: cam(inputs),
}
THEIRS: dict[str, Make] = {
    "torch-cam CAM, twice": torch_cam("CAM"),
    "torch-cam GradCAM, twice": torch_cam("GradCAM"),
    "torch-cam FinerCAM, twice": torch_cam("FinerCAM"),
    "captum LayerGradCam, twice": captum,
    "MONAI GradCAM, twice": monai,
    "grad-cam GradCAM, twice, numpy": grad_cam("GradCAM"),
    "grad-cam HiResCAM, twice, numpy": grad_cam("HiResCAM"),
    "grad-cam FinerCAM, numpy": grad_cam_finer,
}


def measure(
    device: torch.device, models: Sequence[str], batches: Sequence[int], rounds: int
) -> Iterator[list[Row]]:
    """The host's time, and then the rows of each model and batch size."""
    for name in ("resnet50", "densenet121"):
        yield host_time(name, rounds)
    for batch in batches:
        for name in models:
            torch.manual_seed(0)
            model = get_model(name, weights=None, num_classes=2).to(device).eval()
            inputs = torch.randn(batch, 3, SIZE, SIZE, device=device)
            setting = {"model": name, "batch": batch, "pixels": SIZE, "dtype": "float32"}
            turns = dict(contestants(model, inputs))
            seconds = in_turns(turns, rounds, device, clock=clock_of(device))
            yield ratios("maps", setting, seconds)


def contestants(model: nn.Module, inputs: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """The forward pass first; the rest is told as multiples of it."""

    def forward() -> Tensor:
        with torch.no_grad():
            return model(inputs)  # type: ignore[no-any-return]

    yield "forward pass", forward
    cam = DifferenceCAM(model)
    for name, ours in OURS.items():
        yield name, lambda ours=ours: ours(cam, inputs)  # type: ignore[misc]
    for name, make in THEIRS.items():
        own = copy.deepcopy(model)
        try:
            run = make(own, inputs, DifferenceCAM(own).target_layer)
            run()
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        yield name, run


def host_time(name: str, rounds: int) -> list[Row]:
    """Milliseconds of `cam.maps` beyond the forward pass where there is next to nothing to compute.

    The network's body hands on a stored feature map of 2 x 2 cells, so that what is left is its
    head and what maps cost the processor that leads a GPU.
    """
    model = get_model(name, weights=None, num_classes=2).eval()
    inputs = torch.randn(1, 3, 64, 64)
    cam = DifferenceCAM(model)
    stored: list[Tensor] = []
    layer = cam.target_layer.module
    with torch.no_grad(), layer.register_forward_hook(lambda *given: stored.append(given[2])):
        model(inputs)
    for child in model.children():
        child.forward = (lambda _: stored[0]) if child is layer else lambda given: given
        if child is layer:
            break

    def forward() -> Tensor:
        with torch.no_grad():
            return model(inputs)  # type: ignore[no-any-return]

    turns = {"forward pass": forward, "cam.maps": lambda: cam.maps(inputs)}
    seconds = in_turns(turns, 10 * rounds, calls=10, clock=time.process_time)
    beyond = [
        1e3 * (maps - own)
        for maps, own in zip(seconds["cam.maps"], seconds["forward pass"], strict=True)
    ]
    return [row("host", "cam.maps beyond the forward pass", {"model": name}, beyond, "ms")]


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    for rows in measure(device, options.models, options.batch, options.rounds):
        print(printed(rows), flush=True)


if __name__ == "__main__":
    main()
