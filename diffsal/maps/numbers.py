"""Logits in words: wherever they are read, in figures, reports and the terminal."""

import math

NEGLIGIBLE = 1e-9
"""Below it, a number is written as 0: no decision is so close, but for rounding."""
_WIDEST = 6  # digits before the point


def signed(*values: float) -> list[str]:
    """Numbers that stand together: at least two decimals, and three digits of the largest.

    Example:
        >>> signed(-1.5), signed(1.234, 0.004), signed(0.00123, -5.2e-81)
        (['-1.50'], ['+1.23', '+0.00'], ['+0.00123', '+0.00000'])
        >>> signed(28704911411642368.0, 1.0), signed(5.2e-81), signed(float("nan"))
        (['+2.87e+16', '+1.00e+00'], ['+0.00'], ['+nan'])
    """
    kept = [0.0 if abs(value) < NEGLIGIBLE else value for value in values]
    largest = max((abs(value) for value in kept if math.isfinite(value)), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest else 0
    form = f"+.{max(2, 2 - exponent)}f" if -4 <= exponent < _WIDEST else "+.2e"
    return [format(value, form) for value in kept]
