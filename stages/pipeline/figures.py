"""Numbers in, plots out, and pictures side by side. Nothing here can change a number."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from stages.pipeline.files import whole_file


@dataclass(frozen=True)
class Line:
    """One line of a plot: points in order, perhaps with error bars; `reference` draws it thin, dotted and grey."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    reference: bool = False


def save_lines(
    path: Path, panels: dict[str, list[Line]], *, x: str, y: str, log_x: Sequence[float] = (), log_y: bool = False
) -> None:
    """Write a PNG, whole, with one panel, side by side, for each title; the panels share the axis labels.

    Every other line is dashed, so that of two that coincide both are seen.

    Args:
        log_x: the ticks of a logarithmic x axis; none leaves it linear.
        log_y: a logarithmic y axis.
    """
    from matplotlib.figure import Figure  # here, for it takes a second that most stages need not wait
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(0.6 + 4.6 * len(panels), 3.6), dpi=110, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, line in enumerate(lines):
            style: dict[str, Any] = (
                {"color": "0.45", "ls": ":", "lw": 1.4}
                if line.reference
                else {"marker": "o", "ms": 4, "lw": 1.6, "ls": ("-", (0, (4, 4)))[i % 2]}
            )
            axes.errorbar(line.x, line.y, line.error, label=line.label, capsize=3, **style)
        if log_x:
            axes.set_xscale("log")
            axes.set_xticks(log_x, [f"{tick:g}" for tick in log_x])
            axes.minorticks_off()
            axes.set_xlim(min(log_x) / 1.3, max(log_x) * 1.3)
        if log_y:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            digits = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 500 * low else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=digits))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.25, which="both" if log_y else "major")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:  # nothing may be measured of a small set
            axes.legend(frameon=False, fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def save_contact_sheet(path: Path, groups: list[dict[str, Path]], *, width: int = 250) -> None:
    """Write a PNG, whole, that shows picture files side by side, each scaled to `width` under its name.

    Four to a row; every group begins a new row, as high as its highest picture.
    """
    font, head, gap = ImageFont.load_default(size=14), 24, 10
    rows: list[list[tuple[str, Image.Image]]] = []
    for group in groups:
        images = []
        for name, source in group.items():
            with Image.open(source) as picture:
                height = round(picture.height * width / picture.width)
                images.append((name, picture.convert("L").resize((width, height), Image.Resampling.LANCZOS)))
        rows += [images[i : i + 4] for i in range(0, len(images), 4)]
    heights = [head + max(image.height for _, image in row) + gap for row in rows]
    canvas = Image.new("L", (max(map(len, rows)) * (width + gap) + gap, sum(heights)), 255)
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        top = sum(heights[:i])
        for column, (name, image) in enumerate(row):
            left = gap + column * (width + gap)
            draw.text((left, top + head / 2), name, fill=0, font=font, anchor="lm")
            canvas.paste(image, (left, top + head))
    with whole_file(path) as temporary:
        canvas.quantize(16).save(temporary, format="PNG", optimize=True)
