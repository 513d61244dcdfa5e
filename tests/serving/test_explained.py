import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffsal.data.images import read_image
from diffsal.serving.explained import explained, read_picture, region_of_cells


def test_numbers_are_those_of_a_plain_forward_pass(served, picture) -> None:
    one = served(3, ("a", "b", "c"))
    given = picture(one)
    told = explained(one, given, true=2, false=0)
    with torch.no_grad():
        logits = one.model(given.tensor[None])[0]
    bias = one.model[-1].bias
    assert told["probabilities"] == pytest.approx(logits.softmax(0).tolist(), abs=1e-6)
    assert told["margin"] == pytest.approx(float(logits[2] - logits[0]), abs=1e-5)
    for name, index in (("true", 2), ("false", 0)):
        assert np.sum(told["cells"][name]) + bias[index].item() == pytest.approx(
            float(logits[index]), abs=1e-5
        )
    cells = np.array(told["cells"]["difference"])
    assert told["evidence_for"] == pytest.approx(cells[cells > 0].sum(), abs=1e-5)
    assert told["evidence_against"] == pytest.approx(cells[cells < 0].sum(), abs=1e-5)
    assert told["true_name"] == "c"
    assert told["false_name"] == "a"


def test_regions_hold_the_cells_that_the_page_shows(served, picture) -> None:
    one = served()
    told = explained(one, picture(one))
    cells, numbers = np.array(told["cells"]["difference"]), np.array(told["region_of"])
    assert told["regions"]
    for number, region in enumerate(told["regions"], start=1):
        assert cells[numbers == number].sum() == pytest.approx(region["logits"], abs=1e-6)
        assert (numbers == number).sum() == region["cells"]
    assert numbers.max() == len(told["regions"])


def test_a_region_that_is_not_told_of_has_no_number() -> None:
    difference = torch.tensor([[3.0, 0.0, -2.0]])
    assert region_of_cells(difference, 1) == [[1, 0, 0]]


def test_the_answer_is_json_of_finite_numbers(served, picture) -> None:
    one = served()
    json.dumps(explained(one, picture(one)), allow_nan=False)


def test_a_file_in_memory_is_read_as_one_on_disk(served, png, tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    one = served()
    given = read_picture(one, png(), "a.png")
    assert torch.equal(given.tensor, one.preprocessing(read_image(tmp_path / "a.png")))
    assert given.size == (40, 60)


def test_transparency_and_grey_become_colours(served, tmp_path) -> None:
    for mode in ("RGBA", "L", "P", "I;16"):
        Image.new(mode, (9, 7)).save(tmp_path / "a.png")
        given = read_picture(served(), (tmp_path / "a.png").read_bytes(), "a.png")
        assert given.image.shape == (7, 9, 3)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n broken", b"GIF89a"])
def test_what_is_no_image_is_one_line_with_its_name(served, refused, content) -> None:
    with refused(r"^holiday\.png: .+"):
        read_picture(served(), content, "holiday.png")


def test_too_many_pixels_are_refused(served, png, refused, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)
    with refused("40 x 60 pixels are more than the limit of 2000"):
        read_picture(served(), png(), "a.png")


def test_what_is_not_finite_is_refused(served, picture, refused) -> None:
    one = served()
    with torch.no_grad():
        one.model[-1].bias[0] = torch.nan
    with refused("not finite"):
        explained(one, picture(one))


def test_names_that_do_not_fit_are_refused(served, picture, refused) -> None:
    one = replace(served(), classes=("a", "b", "c"))
    with refused("3 class names for a model of 2 classes"):
        explained(one, picture(one))


def test_one_logit(served, picture) -> None:
    one = served(1)
    told = explained(one, picture(one), true=0)
    assert told["one_output"]
    assert told["common_mode_share"] is None
    assert told["margin"] == pytest.approx(-told["logits"][0], abs=1e-6)
