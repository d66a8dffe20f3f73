"""All metrics by name, and what a score is.

To add one: a file here with a function of (real, fake), and a line in METRICS, with its import. `reference` then measures its
floor, `evaluate` scores every set with it, and the table of results and MLflow show it under its name.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from stages.fidelity.accuracy import accuracy
from stages.fidelity.class_tv import class_tv
from stages.fidelity.confident import confident
from stages.fidelity.confident_ratio import confident_ratio
from stages.fidelity.fid import fid
from stages.fidelity.precision import precision
from stages.fidelity.recall import recall
from stages.fidelity.sets import Fake, Real

Measured = tuple[float, float | None]
"""A value and its standard error; no error where there is none to tell."""


@dataclass(frozen=True)
class Score:
    """A value, one standard error of it, and its floor: the same score of real images; None where there is none."""

    value: float
    error: float | None = None
    floor: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """As it stands in metrics/evaluate."""
        return asdict(self)


class Metric(NamedTuple):
    """How a set is scored."""

    measure: Callable[[Real, Fake], Measured | None]
    """A pure function; None where the score has no meaning for the set."""
    depends_on_n: bool = True
    """Whether the value depends on N. Its floor then holds for one N only, and small sets are not scored."""
    of_neighbours: bool = False
    """Whether it compares as many samples with as many real images; a small split has fewer than N."""
    of_covariance: bool = False
    """Whether it needs many real images, for their covariance."""
    undefined: str = ""
    """Why it has no value where `measure` gives none."""
    floor: float | None = None
    """What real images score by definition; None: `reference` measures it."""


METRICS = {
    "fid": Metric(fid, of_covariance=True),
    "class_tv": Metric(class_tv),
    "precision": Metric(precision, of_neighbours=True),
    "recall": Metric(recall, of_neighbours=True),
    "accuracy": Metric(accuracy, depends_on_n=False, undefined="the network was told no labels"),
    "confident": Metric(confident, depends_on_n=False),
    "confident_ratio": Metric(
        confident_ratio, depends_on_n=False, undefined="the classifier is confident of no real image", floor=1.0
    ),
}
