"""Stiffness detection for explicit methods: an eigenvalue estimate from two stages, and a count of stiff steps."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from aca_ext.numerics.tableau import Tableau

# Ends of the real stability intervals: |R(-x)| <= 1 for 0 <= x <= end.
_STABILITY_ENDS = {"tsit5": 3.5068, "dopri5": 3.3065, "dopri8": 5.1666}
# A step whose size is limited by stability goes up to the end, on average; one limited by accuracy stays below.
_SAFETY = 0.9
_STIFF_STEPS, _OTHER_STEPS = 15, 6


@dataclass(frozen=True)
class EigenvalueEstimate:
    """Weights of the slopes k_j of a step that estimate h times the absolute value of the dominant eigenvalue.

    The last two stages have the same node, so their slopes differ only by their states, which differ by
    ``h sum_j weights_j k_j``: ``h |lambda| ~ |k_s - k_{s-1}| / |sum_j weights_j k_j|``. No evaluation is needed.

    Source: Shampine, ACM TOMS 3 (1977), used in dopri5.f: Hairer & Wanner, Solving ODEs II, IV.2.

    Attributes:
        weights: s weights of the slopes.
        limit: estimate above which stability limits the step.
    """

    weights: tuple[float, ...]
    limit: float

    @classmethod
    def of(cls, tableau: Tableau) -> EigenvalueEstimate | None:
        """The estimate for a method, or None if the method has no two stages for it."""
        if tableau.name not in _STABILITY_ENDS or not tableau.fsal:
            return None
        last, previous = tableau.a[-1], (*tableau.a[-2], Fraction(0))
        weights = (*(float(x - y) for x, y in zip(last, previous, strict=True)), 0.0)
        return cls(weights, _SAFETY * _STABILITY_ENDS[tableau.name])


@dataclass
class StiffnessCount:
    """Counts accepted steps that stability limits; the problem is stiff after 15, and not after 6 others in a row.

    Source of the rule and its numbers: dopri5.f by Hairer & Wanner.
    """

    limit: float
    stiff: int = 0
    others: int = 0

    def observe(self, slope_distance: float, state_distance: float) -> None:
        """Takes the two norms of an accepted step whose quotient is the estimate.

        Equal slopes say nothing about the eigenvalue and count as not stiff; NaN counts as stiff.
        """
        if slope_distance <= self.limit * state_distance:
            self.others += 1
            if self.others >= _OTHER_STEPS:
                self.stiff = 0
        else:
            self.stiff, self.others = self.stiff + 1, 0

    @property
    def is_stiff(self) -> bool:
        return self.stiff >= _STIFF_STEPS
