"""One finished audit that many tests look at."""

import json

import pytest
import torch
from auditing.samples import NAMES, loaded_model, model_file, read_rows, settings, write_index

from diffsal.auditing import clusters, sampling
from diffsal.auditing.run import audit
from diffsal.data.index import read_index
from diffsal.models.checkpoints import load_model


class Audited:
    """A finished audit with everything in it."""

    def __init__(self, folder):
        self.folder = folder / "audit"
        self.index = read_index(write_index(folder / "data"), classes=NAMES[:2])
        self.loaded = loaded_model(folder)
        reference = load_model(model_file(folder / "reference.pt", seed=1))
        every = settings(precision=1e-6)  # so that tests measure all images
        self.result = audit(self.index, self.loaded, self.folder, every, reference)
        self.json = json.loads((self.folder / "audit.json").read_text("utf-8"))
        self.table = read_rows(self.folder / "per-image.csv")
        self.reference = read_rows(self.folder / "per-image-reference.csv")
        self.page = (self.folder / "report.html").read_text("utf-8")
        self.findings = {finding["id"]: finding for finding in self.json["findings"]}

    def numbers(self):
        return [number for finding in self.json["findings"] for number in finding["numbers"]]


@pytest.fixture(scope="session")
def audited(tmp_path_factory):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "_DRAWS", 1)
        return Audited(tmp_path_factory.mktemp("audited"))


@pytest.fixture(scope="module", autouse=True)
def kinds_at_a_glance(few_draws):
    """Where it is not the draws that are tested."""


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch):
    """Four images for slow tests, where a test does not look at their samples."""
    monkeypatch.setattr(sampling, "FEWEST", 4)
