"""Kinds of evidence: planted ones are found, noise has none, and the files tell them."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from auditing.samples import audit_of, loaded_model, read_rows, say, settings
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import nn

from diffsal.auditing.clusters import cluster_maps
from diffsal.auditing.run import audit
from diffsal.data.index import read_index
from diffsal.maps.target_layers import find_target_layer


def planted(count=36, share=3, noise=0.3, seed=0):
    """Evidence on the right in one of ``share`` maps, else on the left, of any size; the truth."""
    generator = np.random.default_rng(seed)
    truth = (np.arange(count) % share == 0).astype(int)
    maps = noise * generator.normal(size=(count, 4, 4))
    maps[truth == 0, :, :2] += 1
    maps[truth == 1, :, 2:] += 1
    return maps * generator.uniform(0.1, 10, (count, 1, 1)), truth


@pytest.fixture
def every_draw(monkeypatch):
    """As many draws without kinds as in use."""
    monkeypatch.setattr("diffsal.auditing.clusters._DRAWS", 19)


def test_planted_kinds_are_found(every_draw):
    maps, truth = planted()
    found = cluster_maps(maps)
    assert found.distinct
    np.testing.assert_array_equal(found.cluster, truth)  # the larger kind is the first
    units = maps.reshape(36, -1) / np.linalg.norm(maps.reshape(36, -1), axis=1, keepdims=True)
    expected = KMeans(2, n_init=10, random_state=5).fit_predict(units)
    assert adjusted_rand_score(found.cluster, expected) == 1
    assert found.silhouette == pytest.approx(silhouette_score(units, expected), abs=1e-4)
    for kind, mean in enumerate(found.means):
        own = units[truth == kind]
        np.testing.assert_allclose(mean.ravel(), own.mean(0), atol=1e-6)
        distances = np.linalg.norm(units - mean.ravel(), axis=1)
        distances[truth != kind] = np.inf
        assert found.nearest[kind] == np.argsort(distances)[:3].tolist()


def test_five_kinds_are_counted():
    generator = np.random.default_rng(0)
    truth = np.arange(50) % 5
    maps = 0.2 * generator.normal(size=(50, 3, 3))
    maps.reshape(50, 9)[np.arange(50), truth] += 1
    found = cluster_maps(maps)
    assert found.distinct
    assert adjusted_rand_score(found.cluster, truth) == 1


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("count", "side", "decay"), [(40, 4, 1.0), (120, 7, 0.7)])
def test_noise_has_no_kinds(every_draw, count, side, decay, seed):
    """Of no direction; and smooth, in few directions, of which clusters come out well apart."""
    noise = np.random.default_rng(seed).normal(size=(count, side * side))
    noise *= decay ** np.arange(side * side)
    found = cluster_maps(noise.reshape(count, side, side))
    assert not found.distinct
    assert found.cluster.max() >= 1
    if decay < 1:
        assert found.silhouette > 0.2  # a fixed bound would have called them kinds


def test_equal_data_give_equal_kinds_whatever_their_size():
    maps, _ = planted(noise=0.5)
    found, again, louder = cluster_maps(maps), cluster_maps(maps), cluster_maps(1000 * maps)
    for other in (again, louder):
        np.testing.assert_array_equal(found.cluster, other.cluster)
        np.testing.assert_array_equal(found.means, other.means)
        assert (found.silhouette, found.nearest) == (other.silhouette, other.nearest)


def test_maps_of_zeros_are_of_no_kind():
    maps, truth = planted()
    maps[[4, 9]] = 0
    found = cluster_maps(maps)
    assert found.cluster[[4, 9]].tolist() == [-1, -1]
    kept = np.delete(np.arange(36), [4, 9])
    assert adjusted_rand_score(found.cluster[kept], truth[kept]) == 1
    assert not {4, 9} & {image for images in found.nearest for image in images}


def test_many_images_are_given_to_the_nearest_centre(monkeypatch):
    monkeypatch.setattr("diffsal.auditing.clusters._CLUSTERED", 20)
    maps, truth = planted(60)
    assert adjusted_rand_score(cluster_maps(maps).cluster, truth) == 1


def test_too_few_or_equal_maps_are_refused(refused):
    maps, _ = planted()
    with refused("9 images have a map that is not zero, and kinds need 10"):
        cluster_maps(maps[:9])
    with refused("maps of all images are alike"):
        cluster_maps(np.ones((20, 4, 4)) * np.arange(1, 21)[:, None, None])


class Brightness(nn.Module):
    """A bag of features: light cells speak for the second class, dark ones for the first."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 1, 8, 8)
        nn.init.constant_(self.features.weight, 1 / 192)
        nn.init.zeros_(self.features.bias)
        self.fc = nn.Linear(1, 2)
        self.fc.weight.data = torch.tensor([[-9.0], [9.0]])
        nn.init.zeros_(self.fc.bias)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Light or dark on the left, in every third image on the right; two labels are wrong."""
    folder = tmp_path_factory.mktemp("kinds")
    generator = np.random.default_rng(0)
    lines = [["path", "label"]]
    for number in range(18):
        pixels = generator.integers(110, 145, (32, 32), dtype=np.uint8)
        side = slice(16, 32) if number % 3 == 0 else slice(0, 16)
        pixels[:, side] = 220 if number % 2 else 30
        Image.fromarray(pixels).save(folder / f"{number}.png")
        name = "light" if (number % 2) != (number in (0, 6)) else "dark"
        lines.append([f"{number}.png", name])
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    model = Brightness().eval()
    loaded = replace(loaded_model(folder), model=model, layer=find_target_layer(model))
    index = read_index(folder / "index.csv", classes=("dark", "light"))
    return audit(index, loaded, folder / "audit", settings()), folder / "audit"


def test_places_are_kinds_whichever_class_they_speak_for(result):
    document, folder = result
    table = read_rows(folder / "per-image.csv")
    expected = [2 if number % 3 == 0 else 1 for number in range(18)]
    assert table["cluster"].tolist() == expected
    left, right = document["clusters"]["kinds"]
    assert (left["images"], right["images"]) == (12, 6)
    assert left["classes"] == {"dark": 6, "light": 6}
    assert (left["error"]["mean"], left["error"]["low"]) == (0, None)
    assert right["error"]["mean"] == pytest.approx(2 / 6)
    assert right["error"]["low"] < 2 / 6 < right["error"]["high"]
    mean = np.array(left["map"])
    assert mean[:, :2].min() > 0.2  # towards the decision, though half of them are dark
    assert np.abs(mean[:, 2:]).max() < 0.1
    kinds = dict(zip(table["path"], expected, strict=True))
    assert [kinds[path] for path in left["examples"] + right["examples"]] == [1, 1, 1, 2, 2, 2]


def test_kinds_are_told_and_drawn(result):
    document, folder = result
    assert "are of 2 kinds that hold together" in say(document, "clusters")
    page = (folder / "report.html").read_text("utf-8")
    assert page.count('alt="Mean map of kind') == 2
    assert page.count('alt="Evidence for the prediction') == 6


def test_what_is_not_distinct_is_not_told(audited):
    assert audited.json["clusters"]["distinct"] == bool(audited.json["clusters"]["kinds"])
    if not audited.json["clusters"]["distinct"]:
        assert audited.findings["clusters"]["says"].startswith("No distinct kinds")
        assert np.isnan(audited.table["cluster"]).all()
        assert "Mean map of kind" not in audited.page


def test_few_images_are_said_to_be_few(tmp_path):
    result = audit_of(tmp_path, loaded_model(tmp_path), (4, 4))
    assert "kinds need 10" in say(result, "clusters")
    assert result["clusters"] is None
    assert "kinds of evidence" in {one["what"] for one in result["left_out"]}
