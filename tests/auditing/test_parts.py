"""Numbers within classes, subsets and groups."""

import numpy as np
import pytest
from auditing.samples import NAMES, loaded_model, settings, write_index

from diffsal.auditing.run import audit
from diffsal.data.index import read_index


def test_parts_are_means_of_their_rows(tmp_path):
    source = write_index(tmp_path / "data", (12, 8), maps=False)
    lines = source.read_text().splitlines()
    marked = [f"{lines[0]},subset,group"]
    for number, line in enumerate(lines[1:]):
        subset = ("print", "mask")[number % 2] if line.endswith(",8") else ""
        marked.append(f"{line},{subset},{'p1' if number < 6 else f'q{number}'}")
    source.write_text("\n".join(marked))
    index = read_index(source, classes=NAMES[:2])
    result = audit(index, loaded_model(tmp_path), tmp_path / "audit", settings())
    parts = {(one["by"], one["name"]): one for one in result["parts"]}
    assert list(parts) == [("class", "3"), ("class", "8"), ("group", "p1")]
    assert [one["images"] for one in parts.values()] == [12, 8, 6]
    for part in parts.values():
        names = [number["name"] for number in part["numbers"]]
        assert "occlusion_difference" in names
        assert "energy_difference" not in names  # there are no human maps
    accuracy = [parts["class", name]["numbers"][0]["mean"] for name in "38"]
    (overall,) = (
        number["mean"]
        for finding in result["findings"]
        for number in finding["numbers"]
        if number["name"] == "correct"
    )
    assert np.average(accuracy, weights=[12, 8]) == pytest.approx(overall)
    page = (tmp_path / "audit" / "report.html").read_text("utf-8")
    assert "By class, subset and group" in page
