"""What happens at which step of a training. The first step is 1."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Phase(NamedTuple):
    """A stretch of training with a learning-rate schedule of its own: the steps begin + 1 .. end."""

    begin: int
    end: int


@dataclass(frozen=True)
class Timetable:
    """The phases, and the steps after which the losses are reported."""

    phases: tuple[Phase, ...]
    reports: frozenset[int]

    @classmethod
    def of(cls, images: Sequence[int], batch: int, points: int) -> "Timetable":
        """The timetable of phases of so many images, each with `points` reports, the last of them at its end."""
        ends = list(itertools.accumulate(math.ceil(n / batch) for n in images))
        phases = tuple(Phase(begin, end) for begin, end in itertools.pairwise([0, *ends]))
        return cls(phases, frozenset(step for phase in phases for step in _parts(phase, points)))

    @property
    def end(self) -> int:
        """The last step."""
        return self.phases[-1].end

    @property
    def longest_interval(self) -> int:
        """Steps between two reports, at most."""
        return max(after - before for before, after in itertools.pairwise([0, *sorted(self.reports)]))

    def phase_of(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        return next(phase for phase in self.phases if step <= phase.end)


def _parts(phase: Phase, n: int) -> list[int]:
    """The last step of each of n about equal parts of a phase."""
    return [phase.begin + math.ceil((phase.end - phase.begin) * k / n) for k in range(1, n + 1)]
