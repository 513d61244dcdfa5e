"""What docs/coming-from.md says of other libraries holds, and the examples beside them run."""

import runpy
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import resnet18

import diffsal
from diffsal.data.preprocessing import Preprocessing

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def output_of(module, model, x):
    """What a module gives when the model runs on x, and what the model returns."""
    kept = []
    hook = module.register_forward_hook(lambda _, __, output: kept.append(output))
    returned = model(x)
    hook.remove()
    return kept[0], returned


def by_hand(model, x):
    """Of a ResNet the map for class 1 against class 0: features by the rows of its last layer."""
    with torch.no_grad():
        features, _ = output_of(model.layer4, model, x)
    weights = model.fc.weight[1] - model.fc.weight[0]
    return torch.einsum("bchw,c->bhw", features, weights.detach()) / features[0, 0].numel()


@pytest.mark.parametrize("layer", ["layer4", "layer3"])
def test_channel_mean_maps_are_captums_layer_grad_cam(layer):
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model = resnet18(num_classes=2).eval()
    images = torch.rand(2, 3, 64, 64)
    own = diffsal.explain(model, images, true=1, target_layers=layer, weighting="channel_mean")
    theirs = captum.LayerGradCam(model, model.get_submodule(layer)).attribute(images, target=1)
    torch.testing.assert_close(own.true, theirs[:, 0].detach(), rtol=1e-4, atol=1e-6)


def test_captum_draws_the_difference():
    visualization = pytest.importorskip("captum.attr").visualization
    torch.manual_seed(0)
    images = torch.rand(1, 3, 64, 64)
    maps = diffsal.explain(resnet18(num_classes=2).eval(), images).resized((64, 64))
    figure, _ = visualization.visualize_image_attr(
        maps.difference[0, ..., None].numpy(),
        images[0].permute(1, 2, 0).numpy(),
        method="blended_heat_map",
        sign="all",
        use_pyplot=False,
    )
    assert figure.axes


def test_hugging_face_models_are_explained_by_the_layers_that_are_found(tmp_path):
    pytest.importorskip("transformers")
    module = example("hf_models")
    found = module["main"](tmp_path)
    pixels = torch.from_numpy(module["digits"]()[1].images[:2]).permute(0, 3, 1, 2)
    x, models = pixels / 127.5 - 1, module["networks"]()
    for name, maps in found.items():
        with torch.no_grad():
            logits = models[name](x).logits
        torch.testing.assert_close(maps.margin, logits[:, 1] - logits[:, 0], rtol=1e-4, atol=1e-4)
        assert Image.open(tmp_path / f"{name}.png").size[0] > 1000

    resnet = models["resnet"]
    features, _ = output_of(resnet.resnet.encoder.stages[-1], resnet, x)
    weights = resnet.classifier[1].weight[1] - resnet.classifier[1].weight[0]
    mine = torch.einsum("bchw,c->bhw", features, weights) / 64
    torch.testing.assert_close(found["resnet"].difference, mine.detach(), rtol=1e-4, atol=1e-5)

    vit = models["vit"]
    tokens, outputs = output_of(vit.vit.layers[-1].layernorm_before, vit, x)
    margin = outputs.logits[:, 1] - outputs.logits[:, 0]
    (gradient,) = torch.autograd.grad(margin.sum(), tokens)
    mine = (tokens * gradient).sum(2)[:, 1:].unflatten(1, (8, 8))  # the first one is the class's
    plain = diffsal.explain(vit, x, true=1, fixed_statistics=False)
    torch.testing.assert_close(plain.difference, mine.detach(), rtol=1e-3, atol=1e-5)
    assert found["vit"].difference.std() > 1e-3


def test_quantus_explains_the_model_that_it_hands_over():
    pytest.importorskip("quantus")
    explain_func = example("quantus_metrics")["difference_maps"]
    torch.manual_seed(0)
    model = resnet18(num_classes=2).eval()
    x = torch.rand(2, 3, 64, 64)
    explain_func(model, x.numpy(), np.array([1, 1]))
    changed = deepcopy(model)
    for module in changed.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for one in (model, changed):
        wanted = F.interpolate(by_hand(one, x)[:, None], (64, 64), mode="bilinear")
        for targets, sign in ((1, 1), (0, -1)):
            maps = explain_func(model=one, inputs=x.double().numpy(), targets=np.full(2, targets))
            assert maps.shape == (2, 1, 64, 64)
            np.testing.assert_allclose(maps, sign * wanted, rtol=1e-4, atol=1e-5)


def test_quantus_measures_difference_maps():
    quantus = pytest.importorskip("quantus")
    module = example("quantus_metrics")
    found = module["main"](epochs=1, samples=4)
    assert len(found) == 3
    assert np.isfinite(list(found.values())).all()
    torch.manual_seed(0)
    model, x = resnet18(num_classes=2).eval(), torch.rand(2, 3, 64, 64)
    marked = np.zeros((2, 1, 64, 64), bool)
    marked[..., :32] = True
    metric = quantus.RelevanceMassAccuracy(abs=True, normalise=False, disable_warnings=True)
    scores = metric(
        model,
        x.numpy(),
        np.array([1, 1]),
        s_batch=marked,
        explain_func=module["difference_maps"],
        device="cpu",
    )
    evidence = F.interpolate(by_hand(model, x)[:, None], (64, 64), mode="bilinear")[:, 0].abs()
    np.testing.assert_allclose(scores, evidence[..., :32].sum((1, 2)) / evidence.sum((1, 2)), 1e-4)


def test_volumes_are_explained_as_monai_does():
    visualize = pytest.importorskip("monai.visualize")
    module = example("monai_volumes")
    model, volumes = module["network"](), torch.rand(2, 1, 32, 32, 48)
    maps = module["main"](volumes)
    assert maps.difference.shape == (2, 4, 4, 6)
    with torch.no_grad():
        logits = model(volumes)
    torch.testing.assert_close(maps.margin, logits[:, 1] - logits[:, 0])

    layer = "class_layers.relu"  # theirs cannot take the one before, as this one is in place
    theirs = visualize.GradCAM(
        nn_module=deepcopy(model),  # which keeps its hooks
        target_layers=layer,
        upsampler=lambda size: lambda one: one,
        postprocessing=lambda one: one,
    )
    how = {"true": 1, "weighting": "channel_mean", "target_layers": layer}
    own = diffsal.explain(model, volumes, **how)
    assert own.true.std() > 1e-4
    for number in range(2):  # theirs are of one volume at a time
        map_ = theirs(volumes[number : number + 1], class_idx=1)[0, 0].detach()
        torch.testing.assert_close(own.true[number].relu(), map_, rtol=1e-3, atol=1e-6)


def test_volumes_have_no_figure(refused):
    pytest.importorskip("monai")
    maps = example("monai_volumes")["main"](torch.rand(1, 1, 32, 32, 32))
    with refused("maps of volumes have no figure: take slices of them"):
        maps.figure()


@pytest.fixture
def photographs(tmp_path):
    """Paths of two images, and a model of a file."""
    torch.manual_seed(0)
    diffsal.save_checkpoint(
        tmp_path / "weights.pt",
        resnet18(num_classes=2),
        architecture="resnet18",
        arguments={"num_classes": 2},
        preprocessing=Preprocessing(size=(64, 64)),
    )
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return [str(path) for path in paths], diffsal.load_model(tmp_path / "weights.pt")


def test_heatmaps_have_one_scale_with_zero_in_the_middle(photographs):
    paths, loaded = photographs
    maps, margins, largest = example("fiftyone_heatmaps")["evidence"](paths, loaded)
    x = torch.stack([loaded.preprocessing(path) for path in paths])
    wanted = by_hand(loaded.model, x)
    np.testing.assert_allclose(maps, wanted, rtol=1e-4, atol=1e-5)
    assert largest == pytest.approx(float(wanted.abs().max()), rel=1e-4)
    with torch.no_grad():
        logits = loaded.model(x)
    assert margins == pytest.approx((logits[:, 1] - logits[:, 0]).tolist(), rel=1e-4)


def test_samples_of_fiftyone_get_heatmaps(photographs):
    fiftyone = pytest.importorskip("fiftyone")
    paths, loaded = photographs
    module = example("fiftyone_heatmaps")
    samples = [fiftyone.Sample(filepath=path) for path in paths]
    module["add_heatmaps"](samples, loaded)
    maps, margins, largest = module["evidence"](paths, loaded)
    for sample, one, margin in zip(samples, maps, margins, strict=True):
        assert sample.evidence.range == [-largest, largest]
        np.testing.assert_array_equal(sample.evidence.map, one)
        assert sample.margin == margin
