"""How close two float32 results of the same sums must be, on any machine.

A float32 sum of n products errs by at most n / 2 units of 2^-23 of the sum of their sizes (Higham 2002, sec. 3.1), and
in another order, which AVX2, AVX-512 and SSE4.2 choose differently, by another error. Both are relative to the size of
what is summed, so a bound on the difference must be: the largest element of the expected array stands for that size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FLOAT32 = 2.0**-23  # one unit in the last place of a number in [1, 2)


def close(found: Any, expected: Any, units: float, what: str = "") -> None:
    """Assert that no element of `found` is further from `expected` than `units` * 2^-23 of the largest of `expected`.

    `units`: about three times what was measured on the three instruction sets above.
    """
    bound = units * FLOAT32 * np.abs(np.asarray(expected, np.float64)).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=what)
