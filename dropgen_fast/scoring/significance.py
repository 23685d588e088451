"""How sure a mean is, and whether two runs differ: bootstrap intervals, the signed-rank test, Holm's correction.

The unit of all of them is the case: classes of one patient go up and down together, and only patients are drawn at random.

* *Interval of a mean*: cases are drawn with replacement, and the 95 % interval is the bias-corrected and accelerated one (BCa;
  Efron 1987, J Am Stat Assoc 82:171), because Dice values pile up at one end.
* *Test*: Wilcoxon's signed-rank test on the differences of paired cases (Wilcoxon 1945, Biometrics Bulletin 1:80), two-sided;
  pairs with no difference are left out, as he did.
* *Many classes*: Holm's step-down correction (Holm 1979, Scand J Stat 6:65) over the classes of one measure.

Fewer than 6 cases get neither. A mean of resampled values lies between the smallest and the largest of n values, and these
enclose the median of what the n were drawn from with probability 1 - 2^(1 - n): no such interval can be right 95 % of the time
(for a symmetric distribution) until that is at least 0.95, at n = 6. The smallest two-sided p of the test is 2^(1 - n), which
falls below 0.05 at the same n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
MIN_CASES = 6
RESAMPLES = 9999
DRAWN_AT_ONCE = 1 << 20
"""Values drawn in one go: bounds memory."""

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval | None:
    """The 95 % bootstrap interval of the mean of one value per case; None for fewer than `MIN_CASES`.

    Args:
        values: one per case.
        resamples: how often the cases are drawn anew.
        seed: of the draw; the same values and seed give the same interval.
    """
    if len(values) < MIN_CASES:
        return None
    if min(values) == max(values):
        return values[0], values[0]  # every resample has this mean; BCa would divide 0 by 0
    found = stats.bootstrap((np.asarray(values, np.float64),), np.mean, n_resamples=resamples, confidence_level=CONFIDENCE,
                            method="BCa", batch=max(1, DRAWN_AT_ONCE // len(values)),
                            random_state=np.random.default_rng(seed)).confidence_interval
    return float(found.low), float(found.high)


def signed_rank_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test on paired differences; None for fewer than `MIN_CASES` of them.

    Exact for up to 50 differences without ties, else SciPy's choice (`scipy.stats.wilcoxon`, method "auto").
    """
    if len(differences) < MIN_CASES:
        return None
    nonzero = [d for d in differences if d != 0]
    return float(stats.wilcoxon(nonzero, method="auto").pvalue) if nonzero else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for as many tests as there are, in the same order.

    The i-th smallest of m (i from 0) becomes the largest of (m - j) p_j over j ≤ i, and at most 1.
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in corrected]
