"""What `make repro` shows while it works: a line for each cell that ends, and on a terminal a bar of the whole."""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from time import monotonic

from tqdm import tqdm

from stages.sweep import estimates, plan, units
from stages.sweep.units import Unit

BAR = "{n_fmt} of {total_fmt} stages |{bar:20}| {desc}"


class Display:
    """Hears of units how they go."""

    def __init__(self, todo: list[Unit], jobs: int, expected: estimates.Seconds) -> None:
        self._left, self._jobs, self._began = list(todo), jobs, dict[str, float]()
        self._cells, self._scored = sum(unit.is_cell() for unit in todo), 0
        self._expected = expected
        self._took: list[tuple[Unit, float]] = []
        self._went: dict[str, str] = {}  # of every stage that DVC came to: ran, restored or kept
        self._ended_stages, self._now = 0, dict[str, str]()  # of each unit that runs its stage
        self._told: set[str] = set()
        self._end = self._expected_end()  # on the clock of this process; not looked for anew at each look
        self._bar = tqdm(total=sum(len(unit.stages) for unit in todo), bar_format=BAR, disable=None, leave=False)

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def started(self, unit: Unit) -> None:
        """It runs."""
        self._began[unit.name], self._now[unit.name] = monotonic(), "starts"

    def looked(self, unit: Unit, went: dict[str, str], notes: Iterable[str]) -> None:
        """It came so far: `went` has the stages that DVC came to."""
        self._went |= went
        self._now[unit.name] = [*went, "starts"][len(went) - 1].partition("@")[0]
        for note in notes:
            self.say_once(note, note)
        self._show()

    def ended(self, unit: Unit, went: dict[str, str], *, well: bool) -> None:
        """It is over."""
        self._went |= went
        if well and "ran" in went.values():
            self._took.append((unit, monotonic() - self._began[unit.name]))
        self._forget([unit])
        if well and unit.is_cell():
            self._scored += 1
            more = f"  {self._time_left()}" if self._left and self._end else ""
            self._say(f"cell {self._scored} of {self._cells}: {unit.name}  {plan.score(unit.name)}  {self._how(unit)}{more}")
        self._show()

    def failed(self, unit: Unit, why: str, log: Path, skipped: list[Unit]) -> None:
        """It failed, and so those that need it are left out."""
        self._forget(skipped)
        self._say(f"{unit.name} failed: {why} (all that it said: {log})")
        if skipped:
            self._say(f"  left out, for they need it: {', '.join(each.name for each in skipped)}")

    def say_once(self, about: str, line: str) -> None:
        """Print a line, if none was printed yet about the same."""
        if about not in self._told:
            self._told.add(about)
            self._say(line)

    def seconds_left(self) -> float | None:
        """Until all is done, by what was recorded, corrected by how long the like took in this run; None where nothing tells."""
        took = {unit.name: self._seconds(unit) for unit in self._left}
        if any(seconds is None for seconds in took.values()):
            return None
        now = monotonic()
        rest = {name: max((took[name] or 0) - (now - self._began.get(name, now)), 1.0) for name in took}
        running = sorted(self._left, key=lambda unit: unit.name not in self._began)
        return max(units.ends(running, self._jobs, rest).values(), default=0.0)

    def _expected_end(self) -> float | None:
        left = self.seconds_left()
        return None if left is None else monotonic() + left

    def _time_left(self) -> str:
        return f"{estimates.span(max((self._end or 0) - monotonic(), 0))} left"

    def _seconds(self, unit: Unit) -> float | None:
        alike = [(self._expected[other.name], took) for other, took in self._took if _kinds(other) == _kinds(unit)]
        expected, known = self._expected[unit.name], [(before, took) for before, took in alike if before]
        if expected is None:
            return mean(took for _, took in alike) if alike else None
        return expected * sum(took for _, took in known) / sum(before for before, _ in known) if known else expected

    def _how(self, unit: Unit) -> str:
        """What of a cell was done in this run, in a word."""
        went = [(stage, self._went.get(stage)) for stage in (*unit.needs, *unit.stages)]  # a training is a unit of one stage
        ran = next((stage.partition("@")[0] for stage, how in went if how == "ran"), "")
        other = "restored" if any(how == "restored" for _, how in went) else "up to date"
        return {"train": "trained", "sample": "sampled", "evaluate": "scored"}.get(ran, other)

    def _forget(self, gone: list[Unit]) -> None:
        self._left = [unit for unit in self._left if unit not in gone]
        self._ended_stages += sum(len(unit.stages) for unit in gone)
        for unit in gone:
            self._now.pop(unit.name, None)
        self._end = self._expected_end()

    def _show(self) -> None:
        if not self._bar.disable:
            self._bar.n = self._ended_stages
            parts = [self._time_left()] * bool(self._end) + [f"{name}: {stage}" for name, stage in self._now.items()]
            self._bar.set_description_str("  ".join(parts))

    def _say(self, line: str) -> None:
        with self._bar.external_write_mode():
            print(line, flush=True)


def _kinds(unit: Unit) -> tuple[str, ...]:
    return tuple(stage.partition("@")[0] for stage in unit.stages)
