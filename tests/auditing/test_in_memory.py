"""An audit of what is in memory is that of the files."""

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from auditing.samples import (
    NAMES,
    PREPROCESSING,
    BagOfFeatures,
    loaded_model,
    settings,
    write_index,
)
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

import diffsal
from diffsal.auditing.run import audit as audit_files
from diffsal.data.datasets import ImageDataset
from diffsal.data.images import read_image, read_map
from diffsal.data.index import read_index
from diffsal.data.preprocessing import Preprocessing
from diffsal.data.sources import hold
from diffsal.models.checkpoints import load_model

HOW = {"precision": 1.0, "device": "cpu", "batch_size": 64}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return read_index(write_index(tmp_path_factory.mktemp("data"), (4, 4)), classes=NAMES[:2])


@pytest.fixture(scope="module")
def files(index, tmp_path_factory):
    """The model, and the audit of the files."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffsal.auditing.sampling.FEWEST", 4)
        audit_files(index, loaded_model(folder), folder / "audit", settings())
        found = diffsal.audit(load_model(folder / "weights.pt"), index, **HOW)
    found.save(folder / "again")
    return folder, found


class Pictures(Dataset):
    """Image, class and, for some, a map, as Pillow's images in a mapping or as arrays."""

    def __init__(self, index, form):
        self.samples, self.form = index.samples, form
        self.classes = list(index.classes)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, position):
        sample = self.samples[position]
        human = None if sample.map is None else read_map(sample.map)
        if self.form == "mapping":
            return {
                "image": Image.open(sample.path),
                "label": self.classes[sample.label],
                "mask": None if human is None else Image.open(sample.map),
            }
        return read_image(sample.path), torch.tensor(sample.label), human


def tensors(index):
    """The network's inputs themselves."""
    dataset = ImageDataset(index.samples, PREPROCESSING)
    items = (dataset[position][:3] for position in range(len(dataset)))
    return [(image, label, None if human.isnan().all() else human) for image, label, human in items]


def numbers_of(found):
    return [{k: v for k, v in row.items() if k != "path"} for row in found.evidence.measured.rows]


@pytest.mark.parametrize("form", ["mapping", "arrays", "tensors"])
def test_a_data_set_in_memory_is_audited_like_its_files(index, files, form):
    folder, of_files = files
    data = tensors(index) if form == "tensors" else Pictures(index, form)
    found = diffsal.audit(load_model(folder / "weights.pt"), data, **HOW)
    expected = numbers_of(of_files)
    for row, other in zip(numbers_of(found), expected, strict=True):
        np.testing.assert_equal(row, other)
    assert found.findings == of_files.findings
    assert {row["label"] for row in found.evidence.measured.rows} == set(index.classes)
    assert found.page().count("data:image/png") == of_files.page().count("data:image/png")


def test_calling_it_writes_what_the_command_writes(files):
    folder, _ = files
    for name in ("per-image.csv", "audit.json", "report.html"):
        own, other = ((folder / part / name).read_text("utf-8") for part in ("again", "audit"))
        moments = re.compile(r"20\d\d-\d\d-\d\dT[\d:+]+")
        assert moments.sub("", own) == moments.sub("", other)


def test_a_loader_is_read_batch_by_batch(index, files):
    folder, of_files = files
    images, labels = zip(*((image, label) for image, label, _ in tensors(index)), strict=True)
    data = TensorDataset(torch.stack(images), torch.tensor(labels))
    found = diffsal.audit(load_model(folder / "weights.pt"), DataLoader(data, batch_size=3), **HOW)
    margins = [row["margin"] for row in of_files.evidence.measured.rows]
    assert [row["margin"] for row in found.evidence.measured.rows] == margins
    assert found.document["data"]["with_human_maps"] == 0


@pytest.mark.parametrize("are_files", [True, False])
def test_what_is_odd_about_the_data_is_said(files, tmp_path, are_files):
    folder, _ = files
    path = write_index(tmp_path, (4, 4))
    for one in read_index(path).samples:
        if one.map is not None:
            Image.new("L", Image.open(one.map).size, 255).save(one.map)
    data = path if are_files else Pictures(read_index(path, classes=NAMES[:2]), "arrays")
    with pytest.warns(UserWarning, match="human maps looked at mark the whole image"):
        diffsal.audit(load_model(folder / "weights.pt"), data, limit=2, **HOW)


def test_the_model_is_left_as_it_was(index):
    model = BagOfFeatures().train()
    before = copy.deepcopy(model.state_dict())
    strides = [one.stride() for one in model.parameters()]
    done = []
    found = diffsal.audit(
        model,
        tensors(index),
        preprocessing=PREPROCESSING,
        classes=index.classes,
        target_layer=model.features,
        progress=lambda *told: done.append(told),
        **HOW,
    )
    assert found.evidence.loaded.target_layer.name == "features"
    assert model.training
    assert strides == [one.stride() for one in model.parameters()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert {("audit", 8, 8), ("composites", 8, 8)} <= set(done)


def test_what_is_found_is_at_hand(files, tmp_path):
    _, found = files
    assert all(sentence in repr(found) for sentence in found.document["summary"])
    assert found.numbers["correct"]["n"] == 8
    assert len(found.table) == 8
    name = found.evidence.measured.rows[2]["path"]
    figure = found.figure(name)
    figure.savefig(tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 1000
    assert "<li>" in found._repr_html_()


def test_figures_of_the_report_are_at_hand(files, refused):
    _, found = files
    for name, per_row in {"composites": 3, "typical": 5, "common-mode": 5}.items():
        figure = found.figure(name)
        assert {len(part.axes) for part in figure.subfigs} == {per_row}
    shown = [one for group in found.document["gallery"] for one in group["images"]]
    titles = [part.get_suptitle() for part in found.figure("typical").subfigs]
    assert [title.partition(", label")[0] for title in titles] == shown[: len(titles)]
    first = found.evidence.composites.pictures[0]
    drawn = found.figure("composites").subfigs[0].axes
    for axes, pixels in zip(drawn, first["pixels"], strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), pixels)
    kinds = (
        {"map": np.eye(4) - 0.5, "images": 5, "examples": [0, 3]},
        {
            "map": -np.eye(4),
            "images": 3,
            "examples": [1],
        },
    )
    told = replace(found.evidence, kinds=SimpleNamespace(each=list(kinds)))
    parts = diffsal.Audit(told).figure("kinds").subfigs
    assert [part.get_suptitle() for part in parts] == ["Kind 1: 5 images", "Kind 2: 3 images"]
    captions = [axes.get_title().replace("\n", "") for part in parts for axes in part.axes]
    paths = [found.evidence.measured.rows[image]["path"] for image in (0, 3, 1)]
    assert captions[0] == captions[3] == "mean map"
    assert [one.partition(", label")[0] for one in captions[1:3] + captions[4:]] == [
        path[-200:] for path in paths
    ]
    for kinds, why in (
        ("too few", "none to tell: too few"),
        (SimpleNamespace(each=[]), "none are"),
    ):
        with refused(f"kinds: .*{why}"):
            diffsal.Audit(replace(found.evidence, kinds=kinds)).figure("kinds")
    with refused("there are: composites, kinds, typical, common-mode, unfaithful, wrong"):
        found.figure("histograms")


def test_the_table_is_pandas_where_it_is_installed(files):
    pytest.importorskip("pandas")
    assert next(iter(files[1].table["path"])).endswith(".png")


def test_pictures_of_tensors_are_their_pixels(index):
    held = hold(tensors(index), classes=None, preprocessing=PREPROCESSING)
    shown = held.source.pixels(held.index.samples[5])
    assert np.abs(shown.astype(int) - read_image(index.samples[5].path)).max() == 0


ONES = torch.ones(3, 8, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (7, "the data are a int: pass a Dataset"),
        ([], "the list is empty"),
        ([ONES], "item 0 is a Tensor: yield (image, label)"),
        ([{"image": ONES, "target": 1}], "with the keys image, target: yield"),
        ([(ONES, -1)], "the label -1 is no class"),
        ([(ONES, "8")], "the label '8' is no class; yield a whole number"),
        ([(ONES, 0.5)], "the label 0.5 is no class"),
        ([(ONES, torch.tensor(0.5))], "the label tensor(0.5000) is no class"),
        ([(ONES, 0), (torch.ones(3, 9, 8), 1)], "has the shape (3, 9, 8), the first (3, 8, 8)"),
        ([(torch.ones(2, 8, 8), 0)], "pass (1, H, W) or (3, H, W)"),
        ([(ONES * 2, 0)], "reach from 2 to 2 where 0 to 1 is right; pass preprocessing="),
        ([(ONES * torch.nan, 0)], "reach from nan to nan"),
        ([(np.zeros((8, 8), np.uint8), 0)], "yields images: pass preprocessing="),
        ([(ONES, 0), (np.zeros((8, 8), np.uint8), 0)], "of a picture, the first (3, 8, 8)"),
    ],
)
def test_what_cannot_be_audited_is_one_line(refused, data, message):
    with refused(re.escape(message)):
        diffsal.audit(BagOfFeatures(), data, **HOW)


def test_inputs_made_in_another_way_are_refused(index, files, refused):
    folder, _ = files
    loaded = load_model(folder / "weights.pt")
    with refused("correct preprocessing: the mean and std that they were normalised with"):
        darker = [(image - 1, label) for image, label, _ in tensors(index)]
        diffsal.audit(loaded, darker, **HOW)
    other = Preprocessing(size=(32, 32))
    with refused("audit it by itself"):
        diffsal.audit(BagOfFeatures(), tensors(index), preprocessing=other, reference=loaded, **HOW)
    with refused("the model is a str: pass an nn.Module"):
        diffsal.audit("weights.pt", tensors(index))
    with refused("the layer Linear is none of the model's modules"):
        diffsal.audit(loaded, tensors(index), target_layer=torch.nn.Linear(1, 1), **HOW)


def test_labels_in_another_order_than_the_models_are_refused(index, files, refused):
    folder, _ = files
    loaded = load_model(folder / "weights.pt")
    data = Pictures(index, "arrays")
    data.classes = data.classes[::-1]
    with refused("calls its classes 8, 3, the model's are 3, 8"):
        diffsal.audit(loaded, data, **HOW)
    named = Pictures(index, "mapping")  # yields names, whose order is of no account
    held = hold(named, classes=tuple(named.classes[::-1]), preprocessing=PREPROCESSING)
    assert held.index.classes[held.index.samples[0].label] == named[0]["label"]


def test_random_augmentation_is_refused(refused):
    class Noisy(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, position):
            return torch.rand(3, 8, 8), position % 2

    with refused("item 0: is another image whenever it is asked for"):
        diffsal.audit(BagOfFeatures(), Noisy(), **HOW)


def test_maps_of_other_forms_are_one_line(files, refused):
    folder, _ = files
    data = [(torch.zeros(3, 32, 32), number % 2, torch.full((4, 4), 2.0)) for number in range(4)]
    with refused(re.escape("its human map has the shape (4, 4) or values beyond 0 to 1")):
        diffsal.audit(load_model(folder / "weights.pt"), data, **HOW)
