"""Words on a picture, against Pillow's own."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont

from diffsal.explaining.typography import Font, drawable, text_length, write

TEXTS = st.text(st.characters(max_codepoint=0x24F), max_size=30).map(drawable)
FONT: Font = (14, "bold")


def face() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight="bold")), 14)


@given(TEXTS, st.floats(5, 40), st.integers(20, 60))
def test_words_are_set_as_pillow_sets_them(text: str, x: float, baseline: int) -> None:
    ours, theirs = (Image.new("RGB", (500, 80), "#ffeedd") for _ in range(2))
    for _ in range(2):  # the second time from what is kept
        ours.paste("#ffeedd", (0, 0, 500, 80))
        write(ImageDraw.Draw(ours), x, baseline, text, FONT, "#b2182b")
    ImageDraw.Draw(theirs).text((x, baseline), text, "#b2182b", face(), "ls")
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@given(TEXTS)
def test_lengths_are_pillows(text: str) -> None:
    assert text_length(text, FONT) == face().getlength(text)
