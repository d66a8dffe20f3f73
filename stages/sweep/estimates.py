"""How long units take: as when last timed here, else as on the machine that is told below."""

import math

from stages.pipeline import clocks, params, processes
from stages.sweep import units
from stages.sweep.units import Unit

# Seconds on one core of a server CPU (AMD EPYC with AVX-512), of the default network: see benchmarks/RESULTS.md.
START = 2.5  # of a unit's DVC
FLAT = {"fetch": 2, "prepare": 2, "reference": 10, "init": 0, "evaluate": 16, "compare": 3}
A_GLYPH = 5.3e-4  # to draw one
AN_EXTRACTOR_IMAGE = 6e-4
A_TRAINED_IMAGE = 2.7e-3  # of PIXELS in the network, and so is the next
AN_EVALUATION = 8.6e-4  # of a sampler, which takes all cores that it is given
PIXELS = 28**2
PICTURE = 64  # pixels a side of images whose size is chosen by what they are
GUIDED = 1.3  # evaluations a step: guidance takes a second one on a part of the chain

UNTIMED = ("compare", "init")  # stages of no dataset, which have no clock
Seconds = dict[str, float | None]
"""Of each unit, by its name."""


def outlook(todo: list[Unit], jobs: int, seconds: Seconds) -> str:
    """When the first cell is done, and when all."""
    known = {name: taken for name, taken in seconds.items() if taken is not None}
    if len(known) < len(todo):
        return "No estimate: not all of this was timed on this machine yet."
    ends = units.ends(todo, jobs, known)
    cells = [ends[unit.name] for unit in todo if unit.is_cell()]
    by = "earlier runs" if all(_is_timed(name) for unit in todo for name in unit.stages) else "what a server CPU takes"
    first = f"the first cell is done in {span(min(cells))}, " if len(cells) > 1 else ""
    return f"Going by {by}, {first}all in {span(max(ends.values()))}, {jobs} at a time"


def seconds_of(todo: list[Unit], jobs: int, loaded: params.Params) -> Seconds:
    """How long units take, by what was last recorded here, of another dataset or T too; else by what they have to do.

    None where that is not known: on a GPU.
    """
    cores = max(1, processes.cores() // max(1, min(jobs, sum(unit.is_cell() for unit in todo))))
    return {unit.name: _seconds_of(unit, cores, loaded) for unit in todo}


def _seconds_of(unit: Unit, cores: int, loaded: params.Params) -> float | None:
    found = START
    for name in unit.stages:
        timed, guess = clocks.latest(name, "seconds"), _guess(name, cores, loaded)
        if timed:
            other = _guess(timed[0], cores, loaded)
            found += timed[1] * (guess / other if guess and other else 1)
        elif processes.has_gpu() and not name.startswith(UNTIMED):
            return None
        else:
            found += guess or 0
    return found


def _is_timed(name: str) -> bool:
    return name.startswith(UNTIMED) or clocks.expected(name, "seconds") is not None


def _guess(name: str, cores: int, loaded: params.Params) -> float | None:
    """Seconds of a stage, as DVC names it, from how many images it trains on, draws or evaluates the network for.

    None for a dataset that params.yaml does not have. `cores`: that a cell has for drawing.
    """
    stage, _, item = name.partition("@")
    dataset = item.partition("-")[0]
    if item and dataset not in loaded.data:
        return None
    if stage in FLAT:
        data = loaded.data.get(dataset)
        drawn = data.train_images + data.validation_images + data.test_images if isinstance(data, params.GlyphsData) else 0
        return FLAT[stage] + A_GLYPH * drawn * (stage == "prepare")
    if stage == "extractor":
        return AN_EXTRACTOR_IMAGE * loaded.extractor.images
    width = (loaded.network.base_channels / 8) ** 2 * loaded.network.blocks_per_level
    size, stem = loaded.data[dataset].size or PICTURE, loaded.network.stem_resolution
    relative = (size / 2 ** max(0, math.ceil(math.log2(size / stem)))) ** 2 / PIXELS * width  # as the U-Net folds images
    if stage == "train":
        if loaded.train.shared and item.split("-")[1] != loaded.sweep.schedules[0]:
            return 0  # it takes the network of the first
        return A_TRAINED_IMAGE * relative * sum(loaded.train.of(dataset).images)
    sample, T = loaded.sample, int(item.split("-")[2])
    steps = sample.images * sample.fast.steps + sample.ancestral_images * T
    return AN_EVALUATION * relative * steps * (GUIDED if sample.guidance else 1) / cores


def span(seconds: float) -> str:
    """So many seconds, as a person says it."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
