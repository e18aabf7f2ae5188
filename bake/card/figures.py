"""Figures: what a sweep found, as pictures that a person would rather look at than read numbers.

Every series differs in marker, dash or lightness as well as in colour, so that greyscale prints keep
them apart; the paper is opaque, so that dark pages do not swallow the axes. The same values give the
same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bake.sweeps.findings import DoseResponse
    from bake.sweeps.points import Interval, Point
    from bake.tuning.bench import Judged

PAPER, INK, GRID = "#fbfaf7", "#22252a", "#d9d6cf"
BLUE, ORANGE, GREY, GREEN = "#1f5fa8", "#c8561b", "#8b8f96", "#dfe9d8"
_STYLE = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "bake",
}
WIDTH, NARROW, HEIGHT, DPI = 7.2, 3.6, 3.0, 160
MOST_TICKS = 9
ALTERNATIVES = {
    "dose-response": "Shift, perplexity of sampled text and KL over the multiplier, with the window",
    "layers": "What each layer of the band gives alone, and what is lost without it",
    "layer-curve": "What every layer moves by itself at one cost, with 95 % intervals",
    "ranking": "What the best candidates move at one cost, with 95 % intervals",
    "norms": "Activation norms over depth, and the coefficients of the band",
}
NARROW_SUFFIX = "-narrow"  # of the name of a figure that a page shows on a narrow screen
FIGURES = "figures"  # the folder, of a sweep and of a bake


def draw_norms(
    path: Path,
    norms: Mapping[int, float],
    coefficients: Mapping[int, float],
    site: str,
    multiplier: float = 1.0,
) -> Path:
    """Draw μ_l over depth, and |α_l| at m over the band, which is shaded. {layer: value} each."""
    alpha = "|α|" if min(coefficients.values()) < 0 else "α"
    alpha += f" at m = {_number(multiplier)}"
    with canvas(path, 1, HEIGHT + 0.2) as (axes,):
        layers = sorted(norms)
        band = sorted(coefficients)
        axes.plot(
            layers,
            [norms[layer] for layer in layers],
            color=INK,
            marker="o",
            ms=3.5,
            lw=1.4,
            label="activation norm μ",
        )
        axes.set(xlabel="decoder layer", ylabel=f"μ at {site}", ylim=(0, None))
        axes.set_title("How large the activations are, and how far each layer is pushed")
        axes.grid(visible=False)  # It would lie over the bars, which belong to other axes.
        _whole_numbers(axes)
        beside = axes.twinx()
        beside.axvspan(band[0] - 0.5, band[-1] + 0.5, color=GREEN, zorder=0, label="band")
        beside.bar(
            band,
            [abs(coefficients[layer]) for layer in band],
            width=0.55,
            color=ORANGE,
            alpha=0.75,
            label=f"coefficient {alpha}",
        )
        top = max(abs(value) for value in coefficients.values())
        beside.set(ylabel=alpha, ylim=(0, 3 * top))
        beside.grid(visible=False)
        beside.spines["right"].set_visible(True)
        axes.set_zorder(beside.get_zorder() + 1)
        axes.patch.set_visible(False)
        handles = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
        _legend_below(axes, handles)
    return path


def draw_dose_response(path: Path, found: DoseResponse, *, narrow: bool = False) -> Path:
    """Draw shift, fluency and KL over m: 95 % intervals, window shaded, chance as a grey band.

    narrow: one below the other, for a screen that is not wide.
    """
    curve = found.curve()
    with canvas(path, 3, 7.2 if narrow else 3.1, stacked=narrow) as (shift, fluency, kl):
        for axes in (shift, fluency, kl):
            _shade_window(axes, found)
            axes.set_xlabel("multiplier m")
            if len(curve) <= MOST_TICKS:
                multipliers = [point.arm.multiplier for point in curve]
                axes.set_xticks(multipliers, [_number(m) for m in multipliers])
            axes.axvline(0, color=GRID, lw=1)
            ends = [point.arm.multiplier for point in (curve[0], curve[-1])]
            axes.set_xlim(
                ends[0] - 0.05 * (ends[1] - ends[0]), ends[1] + 0.05 * (ends[1] - ends[0])
            )
        _draw_controls(shift, found, "shift")
        _draw_series(
            shift,
            [point.arm.multiplier for point in curve if point.shift],
            [point.shift for point in curve if point.shift],
            BLUE,
            "o",
        )
        shift.axhline(0, color=INK, lw=0.6)
        shift.set_title("Shift, nats a token")
        _draw_series(
            fluency,
            [point.arm.multiplier for point in curve if point.fluency_ratio],
            [point.fluency_ratio for point in curve if point.fluency_ratio],
            BLUE,
            "o",
        )
        fluency.set_yscale("log")
        fluency.axhline(found.design.bounds.fluency, color=ORANGE, lw=1, ls="--")
        fluency.set_title("Perplexity of its text, × base")
        _ratio_ticks(fluency)
        steered = [point for point in curve if point.neutral_kl]
        _draw_controls(kl, found, "kl")
        _draw_series(
            kl,
            [point.arm.multiplier for point in steered],
            [point.neutral_kl["p95"] for point in steered],
            BLUE,
            "o",
        )
        kl.axhline(found.design.bounds.kl, color=ORANGE, lw=1, ls="--")
        kl.set_title("KL on neutral text, p95, nats")
        kl.set_ylim(bottom=0)
        handles = [_key("line", BLUE, "the direction"), _key("dash", ORANGE, "bound")]
        if found.controls:
            handles.insert(1, _key("patch", GREY, f"{_seeds(found)} random directions"))
        if any(window.largest is not None for window in found.windows):
            handles.append(_key("patch", GREEN, "operating window"))
        _legend_below(shift, handles, columns=2 if narrow else None)
    return path


def draw_layers(path: Path, layers: Sequence[Mapping[str, Any]], title: str) -> Path:
    """Draw the shift that each layer gives alone, and what is lost without it, as paired bars.

    layers: [{"layer", "alone", "without"}], shifts in nats a token.
    """
    with canvas(path, 1, HEIGHT + 0.2) as (axes,):
        places = [entry["layer"] for entry in layers]
        axes.bar(
            [place - 0.2 for place in places],
            [entry["alone"] for entry in layers],
            width=0.38,
            color=BLUE,
            label="pushed alone",
        )
        axes.bar(
            [place + 0.2 for place in places],
            [entry["lost"] for entry in layers],
            width=0.38,
            color=PAPER,
            edgecolor=INK,
            hatch="///",
            label="lost when left out",
        )
        axes.axhline(0, color=INK, lw=0.6)
        axes.set(xlabel="decoder layer", ylabel="shift, nats a token", title=title)
        _whole_numbers(axes)
        _legend_below(axes, axes.get_legend_handles_labels()[0])
    return path


def draw_separation(path: Path, accuracy: Mapping[int, tuple[float, float, float]]) -> Path:
    """Draw how well each layer's direction separates held-out pairs: {layer: (share, low, high)}."""
    with canvas(path, 1, HEIGHT) as (axes,):
        layers = sorted(accuracy)
        shares = [accuracy[layer][0] for layer in layers]
        axes.fill_between(
            layers,
            [accuracy[layer][1] for layer in layers],
            [accuracy[layer][2] for layer in layers],
            color=BLUE,
            alpha=0.18,
            lw=0,
        )
        axes.plot(layers, shares, color=BLUE, marker="o", ms=3.5, lw=1.4)
        axes.axhline(0.5, color=ORANGE, lw=1, ls="--", label="chance")
        lowest = min(low for _, low, _ in accuracy.values())
        axes.set(xlabel="decoder layer", ylabel="held-out pairs separated")
        axes.set_ylim(min(0.4, lowest - 0.03), 1.02)
        axes.set_title("How well the direction separates, with 95 % intervals")
        _whole_numbers(axes)
        axes.legend(loc="lower right")
    return path


def draw_ranking(path: Path, judged: Sequence[Judged]) -> Path:
    """Draw what candidates move at one cost, the best on top, with 95 % intervals."""
    with canvas(path, 1, 1.1 + 0.34 * len(judged)) as (axes,):
        for place, each in enumerate(reversed(judged)):
            found = each.point.net_shift
            assert found is not None
            axes.plot([found.low, found.high], [place, place], color=BLUE, lw=2.2, alpha=0.45)
            axes.plot([found.value], [place], color=BLUE, marker="o", ms=5)
        names = [each.candidate.name for each in reversed(judged)]
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="net shift of held-out pairs, nats a token", ylim=(-0.6, len(names) - 0.4))
        axes.axvline(0, color=INK, lw=0.6)
        axes.set_title("What moves most at one cost")
    return path


def draw_layer_curve(path: Path, judged: Sequence[Judged], best: Judged) -> Path:
    """Draw what every layer moves by itself at one cost; the best candidate's layers are shaded."""
    with canvas(path, 1, HEIGHT) as (axes,):
        layers = best.candidate.layers
        axes.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color=GREEN, zorder=0, label="best")
        points = [each.point.net_shift for each in judged]
        places = [each.candidate.layers[0] for each in judged]
        _draw_series(axes, places, [point for point in points if point], BLUE, "o")
        axes.axhline(0, color=INK, lw=0.6)
        axes.set(xlabel="decoder layer", ylabel="net shift, nats a token")
        axes.set_title(f"One layer by itself at one cost ({judged[0].candidate.site})")
        _whole_numbers(axes)
        _legend_below(axes, axes.get_legend_handles_labels()[0])
    return path


def alternative(path: str | Path) -> str:
    """Return what stands for a figure where it is not seen."""
    return ALTERNATIVES[Path(path).stem]


@contextmanager
def canvas(
    path: Path, count: int, height: float, *, stacked: bool = False
) -> Iterator[Sequence[Axes]]:
    """Yield axes side by side, or stacked, on one figure, which is written when the block ends well."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(NARROW if stacked else WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        shape = (count, 1) if stacked else (1, count)
        yield list(figure.subplots(*shape, squeeze=False).flat)
        path.parent.mkdir(parents=True, exist_ok=True)
        # No software version and no time, so that the same values give the same bytes.
        figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _draw_series(
    axes: Axes, places: Sequence[float], values: Sequence[Interval], colour: str, marker: str
) -> None:
    axes.fill_between(
        places,
        [value.low for value in values],
        [value.high for value in values],
        color=colour,
        alpha=0.18,
        lw=0,
    )
    axes.plot(
        places, [value.value for value in values], color=colour, marker=marker, ms=3.5, lw=1.4
    )


def _draw_controls(axes: Axes, found: DoseResponse, what: str) -> None:
    """Shade what the random directions reach; they are as likely to point the other way."""

    def value(point: Point) -> float:
        if what == "kl":
            return point.neutral_kl["p95"].value
        return abs(point.shift.value) if point.shift else 0.0

    sizes = sorted({point.arm.multiplier for point in found.controls})
    if not sizes:
        return
    reach = [max(value(c) for c in found.controls if c.arm.multiplier == size) for size in sizes]
    sides = {point.arm.multiplier > 0 for point in found.curve() if point.arm.kind == "direction"}
    left, right = False in sides, True in sides
    places = [-size for size in reversed(sizes)] * left + [0.0] + sizes * right
    top = [*reversed(reach)] * left + [0.0] + reach * right
    bottom = [-height for height in top] if what == "shift" else [0.0] * len(top)
    axes.fill_between(places, bottom, top, color=GREY, alpha=0.35, lw=0)
    for edge in (bottom, top):  # In greyscale the outline tells chance from window and interval.
        axes.plot(places, edge, color=GREY, lw=0.9, ls=":")


def _shade_window(axes: Axes, found: DoseResponse) -> None:
    edges = [window.largest for window in found.windows if window.largest is not None]
    if edges:
        axes.axvspan(min([0.0, *edges]), max([0.0, *edges]), color=GREEN, zorder=0, lw=0)


def _seeds(found: DoseResponse) -> int:
    return len({point.arm.seed for point in found.controls})


def _key(kind: str, colour: str, label: str) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if kind == "patch":
        return Patch(color=colour, alpha=0.35 if colour == GREY else 1, label=label)
    style = {"line": {"marker": "o", "ms": 3.5}, "dash": {"ls": "--"}}[kind]
    return Line2D([], [], color=colour, label=label, **style)  # type: ignore[arg-type]


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _ratio_ticks(axes: Axes) -> None:
    """Put a handful of plain numbers on a logarithmic axis, however little or much it spans."""
    from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

    low, high = axes.get_ylim()
    locator: Locator = LogLocator()
    if high / low < 4:
        locator = MaxNLocator(5)
    elif high / low < 100:
        locator = LogLocator(subs=(1, 2, 5))
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _number(value: float) -> str:
    """Return a number with the minus sign that the axes have."""
    return f"{value:g}".replace("-", "−")


def _legend_below(axes: Axes, handles: Sequence[Any], columns: int | None = None) -> None:
    """Put one legend under the whole figure, where it covers nothing."""
    ncols = columns or len(handles)
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=ncols)
