"""The report of a search: from the figures of `result.json` to one self-contained page, and to a terminal.

Pure functions of the result. The names in a result are documented where it is put together, `search_client.run`.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Sequence
from html import escape
from math import floor, log10
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

INK, MUTED, FAINT, GRID = "#1b2733", "#64727f", "#c3ccd4", "#e8ecf0"
BLUE, ORANGE, GREEN, SAND = "#1f6feb", "#e36209", "#1a7f5a", "#f4d9bd"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.hashsalt": "latency-lab",  # the same result gives the same page
}
WIDTHS = LinearSegmentedColormap.from_list("widths", ["#ffffff", "#d6e6fb", "#7fb0f2", "#1f5fc4"])

Result = dict[str, Any]


# --- words ----------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, as a person would write them."""
    if value is None:
        return "–"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    if 0 < size < 0.01:
        digits = 2 - floor(log10(size))
    return f"{value:,.{digits}f}{' ' + unit if unit else ''}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def interval(network: Result) -> str:
    low, high = network.get("predicted_low_ms"), network.get("predicted_high_ms")
    return f"{number(low)} to {number(high)} ms" if low is not None and high is not None else "no correction yet"


def prediction_error(network: Result) -> float | None:
    """(predicted - measured) / measured."""
    predicted, measured = network.get("predicted_latency_ms"), network.get("latency_ms")
    return predicted / measured - 1 if predicted and measured else None


def shrunk(result: Result) -> list[list[str]]:
    """What each iteration shrank, in words: one list for each iteration after the initial network."""
    told = []
    trajectory = result["trajectory"]
    for before, after in itertools.pairwise(trajectory):
        words = []
        for index, layer in enumerate(result["layers"]):
            old_width, new_width = before["architecture"]["widths"][index], after["architecture"]["widths"][index]
            old_kernel, new_kernel = before["architecture"]["kernels"][index], after["architecture"]["kernels"][index]
            changes = []
            if new_width != old_width:
                changes.append(f"{old_width} → {new_width}" if new_width else f"{old_width} → removed")
            if new_kernel != old_kernel and new_width:
                changes.append(f"kernel {old_kernel} → {new_kernel}")
            if changes:
                words.append(f"{layer['name']} {', '.join(changes)}")
        told.append(words)
    return told


# --- pictures -------------------------------------------------------------------------------------------------


def picture(draw: Callable[[Axes, Result], None], result: Result, size: tuple[float, float], format: str) -> bytes:
    """One picture as the bytes of an SVG or PNG file."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained", facecolor="none" if format == "svg" else "white")
        axes = figure.subplots()
        axes.set_facecolor("none")
        draw(axes, result)
        target = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else None
        figure.savefig(target, format=format, dpi=160, metadata=metadata)
        return target.getvalue()


def draw_trade_off(axes: Axes, result: Result) -> None:
    """Held-out accuracy over cost: every candidate, and the trajectory through the chosen ones."""
    trajectory, unit = result["trajectory"], result["metric"]["unit"]
    tried = [candidate for entry in trajectory for candidate in entry["candidates"]]
    if tried:
        axes.scatter(
            [one["cost"] for one in tried], [100 * one["quality"] for one in tried],
            s=11, color=FAINT, linewidths=0, label=f"{len(tried)} samples", zorder=1,
        )  # fmt: skip
    costs, qualities = [one["cost"] for one in trajectory], [100 * one["quality"] for one in trajectory]
    axes.plot(costs, qualities, color=BLUE, linewidth=1.8, marker="o", markersize=4, label="chosen", zorder=3)
    axes.axvline(result["budget"], color=ORANGE, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
    axes.annotate(
        f"budget {number(result['budget'], unit)}", (result["budget"], 0), xycoords=("data", "axes fraction"),
        xytext=(5, 22), textcoords="offset points", color=ORANGE, fontsize=8.5,
    )  # fmt: skip
    for entry, label, color in ((trajectory[0], "initial", INK), (trajectory[-1], "discovered", GREEN)):
        axes.scatter([entry["cost"]], [100 * entry["quality"]], s=60, color=color, zorder=4, label=label)
    axes.set_xlabel(f"{result['metric']['name']} ({unit})")
    axes.set_ylabel("held-out accuracy, super-network (%)")
    axes.margins(0.06, 0.1)
    # A sample that lost its head says no more than that: the scale is for those that matter.
    least = min(qualities) - max(1.5 * (max(qualities) - min(qualities)), 6.0)
    below = sum(100 * one["quality"] < least for one in tried)
    if below:
        axes.set_ylim(bottom=least)
        axes.annotate(
            f"{below} samples lie below", (0.02, 0.02), xycoords="axes fraction", color=MUTED, fontsize=8.5
        )  # fmt: skip
    axes.legend(loc="lower right", fontsize=8.5)


def draw_prediction(axes: Axes, result: Result) -> None:
    """Measured over predicted latency of whole networks, with the interval that was claimed."""
    fitted = result.get("calibration") or []
    shown = [("initial", result["initial"], INK), ("discovered", result["discovered"], GREEN)]
    shown = [one for one in shown if one[1].get("latency_ms") and one[1].get("predicted_latency_ms")]
    values = [one["measured_ms"] for one in fitted] + [one["left_out_ms"] for one in fitted]
    values += [network[key] for _, network, _ in shown for key in ("latency_ms", "predicted_latency_ms")]
    low, high = 0.9 * min(values), 1.08 * max(values)
    half = (result.get("correction") or {}).get("relative_half_width")
    if half:
        axes.fill_between(
            [low, high], [low * (1 - half), high * (1 - half)], [low * (1 + half), high * (1 + half)],
            color=BLUE, alpha=0.09, linewidth=0, label=f"claimed interval, ± {percent(half)}",
        )  # fmt: skip
    axes.plot([low, high], [low, high], color=FAINT, linewidth=1)
    if fitted:
        axes.scatter(
            [one["left_out_ms"] for one in fitted], [one["measured_ms"] for one in fitted],
            s=20, color=BLUE, alpha=0.75, linewidths=0, label="calibration networks, each left out of the fit",
        )  # fmt: skip
    for label, network, color in shown:
        axes.scatter(
            [network["predicted_latency_ms"]], [network["latency_ms"]], s=62, color=color, label=label, zorder=4
        )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("predicted from the table (ms)")
    axes.set_ylabel("measured as a whole (ms)")
    axes.legend(loc="upper left", fontsize=8.5)


def draw_widths(axes: Axes, result: Result) -> None:
    """Width of every layer after every iteration, as a share of its full width; what changed is written."""
    trajectory, layers = result["trajectory"], result["layers"]
    shares = [
        [entry["architecture"]["widths"][row] / layer["widths"][-1] for entry in trajectory]
        for row, layer in enumerate(layers)
    ]
    image = axes.imshow(shares, aspect="auto", cmap=WIDTHS, vmin=0, vmax=1, interpolation="nearest")
    for column, (before, after) in enumerate(itertools.pairwise(trajectory), start=1):
        for row in range(len(layers)):
            old = before["architecture"]["widths"][row], before["architecture"]["kernels"][row]
            new = after["architecture"]["widths"][row], after["architecture"]["kernels"][row]
            if old == new:
                continue
            words = [str(new[0])] if new[0] != old[0] else []
            words += [f"k{new[1]}"] if new[1] != old[1] and new[0] else []
            axes.text(
                column, row, " ".join(words), ha="center", va="center",
                fontsize=6.5 if len(trajectory) > 18 else 7.5, color="white" if shares[row][column] > 0.75 else INK,
            )  # fmt: skip
    axes.set_xticks(range(len(trajectory)), [str(entry["iteration"]) for entry in trajectory])
    axes.set_yticks(range(len(layers)), [layer["name"] for layer in layers], fontsize=8)
    axes.set_xlabel("iteration (0 is the initial network)")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row in range(1, len(layers)):
        axes.axhline(row - 0.5, color="white", linewidth=1)
    for column in range(1, len(trajectory)):
        axes.axvline(column - 0.5, color="white", linewidth=1)
    figure = axes.get_figure()
    if isinstance(figure, Figure):
        bar = figure.colorbar(image, ax=axes, fraction=0.018, pad=0.012)
        bar.set_label("width, share of the initial network's")
        bar.outline.set_visible(False)


def draw_time(axes: Axes, result: Result) -> None:
    """Time of the three steps; inside, what the device took."""
    seconds = result["seconds"]
    steps = [
        ("super-network", seconds["super_network"], 0.0),
        ("samples", seconds["samples"], seconds["waiting_for_device_samples"]),
        ("discovered network", seconds["discovered_network"], seconds["waiting_for_device_discovered"]),
    ]
    longest = max(total for _, total, _ in steps) or 1.0
    for row, (_, total, waiting) in enumerate(steps):
        axes.barh(row, total - waiting, height=0.55, color=BLUE, label="this machine" if row == 0 else None)
        axes.barh(
            row, waiting, left=total - waiting, height=0.55, color=SAND,
            label="waiting for the device" if row == 1 and any(step[2] for step in steps) else None,
        )  # fmt: skip
        axes.text(total + 0.012 * longest, row, duration(total), va="center", fontsize=9)
    axes.set_yticks(range(3), [name for name, _, _ in steps])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.16 * longest)
    axes.set_xlabel("seconds")
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower right", fontsize=8.5)


# --- the page -------------------------------------------------------------------------------------------------

PAGE_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8fa; color: #1b2733; font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 36px 28px 60px; }
header { margin-bottom: 26px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 0 0 3px; }
p { margin: 0 0 12px; }
.lead { color: #44525f; max-width: 75ch; margin: 0; }
.note { color: #64727f; font-size: 13.5px; max-width: 85ch; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 22px 0; }
.card, section { background: #fff; border: 1px solid #e3e8ed; border-radius: 10px; }
.card { padding: 15px 18px 13px; }
.card b { display: block; font-size: 25px; font-weight: 640; line-height: 1.2; letter-spacing: -0.01em; }
.card span { color: #64727f; font-size: 13px; }
.card em { display: block; font-style: normal; color: #64727f; font-size: 13px; margin-top: 2px; }
section { padding: 20px 24px; margin-bottom: 18px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; }
.pair section { margin-bottom: 18px; }
img { width: 100%; height: auto; display: block; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin-top: 8px; }
th { text-align: left; font-weight: 550; color: #64727f; font-size: 13px; border-bottom: 1px solid #dfe5ea; }
td, th { padding: 6px 14px 6px 0; vertical-align: top; }
td { border-bottom: 1px solid #eff2f5; }
tr:last-child td { border-bottom: 0; }
.right { text-align: right; font-variant-numeric: tabular-nums; }
details summary { cursor: pointer; color: #1f6feb; font-size: 14px; }
footer { color: #64727f; font-size: 13px; margin-top: 20px; }
code { font: 12.5px ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 760px) { .cards { grid-template-columns: 1fr 1fr; } .pair { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""


def html(result: Result) -> str:
    """The page of a search, with its pictures inside; it loads nothing from anywhere."""
    sections = [_summary_section(result), '<div class="pair">', _picture_section(
        "Trade-off along the trajectory",
        "Each iteration lowers the target and keeps the most accurate sample that meets it.",
        draw_trade_off, result, (5.6, 4.3),
    )]  # fmt: skip
    if _has_latency(result):
        sections.append(_picture_section(
            "Predicted and measured", "The table adds up operators; here the device ran networks as a whole.",
            draw_prediction, result, (5.6, 4.3),
        ))  # fmt: skip
    else:
        sections.append(_picture_section(
            "Time", "What each of the three steps took.", draw_time, result, (5.6, 4.3)
        ))  # fmt: skip
    sections.append("</div>")
    sections.append(_picture_section(
        "What each iteration shrank",
        "Colour is the width a layer keeps. A number is the new number of filters where it changed (0: the layer is "
        "removed and its input bypassed), k the new kernel size.",
        draw_widths, result, (11.4, 0.62 + 0.235 * len(result["layers"])),
    ))  # fmt: skip
    if _has_latency(result):
        sections.append(_picture_section(
            "Time", "What each of the three steps took. While the device measures, nothing else runs here.",
            draw_time, result, (11.4, 2.1),
        ))  # fmt: skip
        sections.append(_service_section(result))
    sections.append(_architecture_section(result))
    sections.append(_trajectory_section(result))
    title = f"{result['name']}: {_headline(result)}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{PAGE_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p class="lead">{escape(_lead(result))}</p>
</header>
{_cards(result)}
{chr(10).join(sections)}
<footer>Written by latency-lab {escape(result["version"])} on {escape(result["finished_at"])}. The same figures under
stable names are in <code>result.json</code>, every iteration in <code>trajectory.jsonl</code>, the discovered
network in <code>discovered.onnx</code>.</footer>
</main>
</body>
</html>
"""


def _has_latency(result: Result) -> bool:
    return result["initial"].get("latency_ms") is not None


def _headline(result: Result) -> str:
    initial, discovered = result["initial"], result["discovered"]
    if result["metric"]["name"] == "latency" and _has_latency(result) and discovered.get("latency_ms"):
        return f"{number(initial['latency_ms'])} ms to {number(discovered['latency_ms'])} ms"
    unit = result["metric"]["unit"]
    return f"{number(initial['cost'])} to {number(discovered['cost'], unit)}"


def _lead(result: Result) -> str:
    target = result.get("target")
    place = f" on {target['description']}" if target else ""
    samples = result["samples"]
    return (
        f"MCD shrank the initial network to {percent(result['budget'] / result['initial']['cost'])} of its "
        f"{result['metric']['name']}{place}, in {samples['iterations']} iterations over {samples['evaluated']} "
        "evaluated samples; the discovered network was then trained on its own."
    )


def _cards(result: Result) -> str:
    initial, discovered = result["initial"], result["discovered"]
    cards = [(
        "test accuracy", percent(discovered["accuracy"]), f"initial network {percent(initial['accuracy'])}"
    )]  # fmt: skip
    unit = result["metric"]["unit"]
    if result["metric"]["name"] != "latency":
        cards.append((result["metric"]["name"], number(discovered["cost"], unit), f"initial {number(initial['cost'])}"))
    if _has_latency(result) and discovered.get("latency_ms"):
        share = discovered["latency_ms"] / initial["latency_ms"]
        cards.append((
            "measured latency", number(discovered["latency_ms"], "ms"),
            f"{percent(share)} of the initial {number(initial['latency_ms'], 'ms')}",
        ))  # fmt: skip
        error = prediction_error(discovered)
        cards.append((
            "predicted latency", number(discovered["predicted_latency_ms"], "ms"),
            f"{100 * error:+.1f} % off; claimed {interval(discovered)}" if error is not None else "",
        ))  # fmt: skip
    else:
        cards.append(("parameters", number(discovered["parameters"]), f"initial {number(initial['parameters'])}"))
    cards.append(("total time", duration(result["seconds"]["total"]), f"{result['samples']['evaluated']} samples"))
    return '<div class="cards">' + "".join(
        f'<div class="card"><span>{escape(label)}</span><b>{escape(value)}</b><em>{escape(note)}</em></div>'
        for label, value, note in cards
    ) + "</div>"  # fmt: skip


def comparison(result: Result) -> list[tuple[str, str, str]]:
    """Rows of the comparison: what, initial, discovered."""
    initial, discovered, unit = result["initial"], result["discovered"], result["metric"]["unit"]
    rows = [("accuracy on test images", percent(initial["accuracy"]), percent(discovered["accuracy"]))]
    if result["metric"]["name"] != "latency":
        rows.append((result["metric"]["name"], number(initial["cost"], unit), number(discovered["cost"], unit)))
    if initial.get("energy_j") is not None:
        rows.append(("energy, measured", number(initial["energy_j"], "J"), number(discovered.get("energy_j"), "J")))
    if _has_latency(result):
        rows += [
            ("latency, measured", _measured(initial), _measured(discovered)),
            ("latency, predicted", number(initial["predicted_latency_ms"], "ms"),
             number(discovered["predicted_latency_ms"], "ms")),
            ("interval of the prediction", interval(initial), interval(discovered)),
        ]  # fmt: skip
    rows += [
        ("multiply-accumulates", number(initial["macs"] / 1e6, "M"), number(discovered["macs"] / 1e6, "M")),
        ("parameters", number(initial["parameters"] / 1e3, "k"), number(discovered["parameters"] / 1e3, "k")),
        ("operators", str(initial["operators"]), str(discovered["operators"])),
    ]
    return rows


def _measured(network: Result) -> str:
    half = network.get("latency_half_width_ms")
    return number(network.get("latency_ms"), "ms") + (f" ± {half:.2g}" if half else "")


def _summary_section(result: Result) -> str:
    note = (
        "Both networks were trained alike on the training images."
        if result["initial"]["accuracy_of"] == "trained"
        else "The accuracy of the initial network is that of the super-network at full width."
    )
    table = _table(("", "initial", "discovered"), comparison(result), right={1, 2})
    return f'<section><h2>Initial and discovered network</h2><p class="note">{note}</p>{table}</section>'


def _service_section(result: Result) -> str:
    service = result["service"]
    rows = [
        ("target", result["target"]["description"]),
        ("pin", f"{result['pin']}: every number of this search can be read again under it"),
        ("operator lookups", f"{service['lookups']:,} for {service['networks']:,} networks"),
        ("answered without measuring", f"{service['lookups_answered_without_measuring']:,}"),
        ("operators measured for this search", f"{service['operators_measured']:,}"),
        ("whole networks measured for this search", f"{service['whole_networks_measured']:,}"),
        ("operators that failed", f"{service['operators_failed']:,}"),
        ("requests over HTTP", f"{service['requests']:,} ({service['retries']:,} repeated)"),
    ]
    if correction := result.get("correction"):
        left_out = correction["left_out"]
        rows.append((
            "correction",
            f"fitted on {left_out['networks']} whole networks; left out of the fit they are off by "
            f"{percent(left_out['mean_error'])} on average and {percent(left_out['max_error'])} at most",
        ))  # fmt: skip
    return f"<section><h2>Where the latencies come from</h2>{_table(('', ''), rows)}</section>"


def _architecture_section(result: Result) -> str:
    first, last = result["trajectory"][0]["architecture"], result["trajectory"][-1]["architecture"]
    rows = []
    for index, layer in enumerate(result["layers"]):
        width = last["widths"][index]
        rows.append((
            layer["name"], str(first["widths"][index]), str(width) if width else "removed",
            str(first["kernels"][index]), str(last["kernels"][index]) if width else "–",
        ))  # fmt: skip
    table = _table(("layer", "filters", "discovered", "kernel", "discovered"), rows, right={1, 2, 3, 4})
    return (
        "<section><h2>The discovered network</h2><details><summary>Filters and kernels of all "
        f"{len(rows)} searched layers</summary>{table}</details></section>"
    )


def _trajectory_section(result: Result) -> str:
    unit = result["metric"]["unit"]
    rows = []
    for entry, words in zip(result["trajectory"], [["the initial network"], *shrunk(result)], strict=True):
        rows.append((
            str(entry["iteration"]), number(entry["target"]), number(entry["cost"]), percent(entry["quality"]),
            str(len(entry["candidates"])), "; ".join(words) or "kept: it meets this target already",
        ))  # fmt: skip
    table = _table(
        ("iteration", f"target ({unit})", f"cost ({unit})", "held-out accuracy", "samples", "shrunk"), rows,
        right={0, 1, 2, 3, 4},
    )  # fmt: skip
    return (
        "<section><h2>Trajectory</h2><details><summary>Target, cost and accuracy of all "
        f"{len(rows) - 1} iterations</summary>{table}</details></section>"
    )


def _picture_section(
    title: str, note: str, draw: Callable[[Axes, Result], None], result: Result, size: tuple[float, float]
) -> str:
    data = base64.b64encode(picture(draw, result, size, "svg")).decode()
    return (
        f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>'
        f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}"></section>'
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: set[int] | None = None) -> str:
    def cell(tag: str, column: int, text: str) -> str:
        attribute = ' class="right"' if column in (right or ()) else ""
        return f"<{tag}{attribute}>{escape(text)}</{tag}>"

    head = "".join(cell("th", column, text) for column, text in enumerate(heads)) if any(heads) else ""
    body = "".join(
        "<tr>" + "".join(cell("td", column, text) for column, text in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


# --- the terminal ---------------------------------------------------------------------------------------------


def summary(result: Result) -> RenderableType:
    """What a terminal shows at the end of a search."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{result['name']}: {_headline(result)}", title_style="bold")
    table.add_column()
    table.add_column("initial", justify="right")
    table.add_column("discovered", justify="right", style="bold")
    for row in comparison(result):
        table.add_row(*row)
    parts: list[RenderableType] = [table]

    steps = Table(box=box.SIMPLE_HEAD, title="what each iteration shrank", title_style="bold")
    for head, justify in (("", "right"), ("target", "right"), ("cost", "right"), ("accuracy", "right")):
        steps.add_column(head, justify=justify)  # type: ignore[arg-type]
    steps.add_column("shrunk", overflow="fold")
    for entry, words in zip(result["trajectory"], [["the initial network"], *shrunk(result)], strict=True):
        steps.add_row(
            str(entry["iteration"]), number(entry["target"]), number(entry["cost"]), percent(entry["quality"]),
            "; ".join(words) or "kept",
        )  # fmt: skip
    parts.append(steps)

    seconds = result["seconds"]
    lines = []
    if _has_latency(result):
        service = result["service"]
        error = prediction_error(result["discovered"])
        if error is not None:
            lines.append(
                f"predicted {number(result['discovered']['predicted_latency_ms'], 'ms')}, measured "
                f"{number(result['discovered']['latency_ms'], 'ms')}: {100 * error:+.1f} % off, "
                f"claimed {interval(result['discovered'])}"
            )
        lines.append(
            f"{service['operators_measured']:,} operators measured, "
            f"{service['lookups_answered_without_measuring']:,} of {service['lookups']:,} lookups answered "
            "without measuring"
        )
    lines.append(
        f"super-network {duration(seconds['super_network'])}, samples {duration(seconds['samples'])}, "
        f"discovered network {duration(seconds['discovered_network'])}"
    )
    parts.append(Text("\n".join(lines)))
    return Group(*parts)
