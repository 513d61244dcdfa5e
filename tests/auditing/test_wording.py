"""Numbers as they are written."""

import pytest

from diffsal.auditing.wording import written


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0.000"),
        (-0.0, "0.000"),
        (0.12345, "0.123"),
        (-1.0, "−1.000"),
        (0.0004, "0.0004"),
        (2.4e-7, "2.4·10⁻⁷"),
        (-3.21e5, "−3.2·10⁵"),
    ],
)
def test_written(value, text):
    assert written(value) == text
