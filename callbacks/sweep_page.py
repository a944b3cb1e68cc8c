"""A sweep as one self-contained page: table, plots, images and failures, with nothing fetched from anywhere."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure
from PIL import Image

from callbacks.sweep_plots import as_svg, heat_map, pareto
from callbacks.sweep_results import Setting, Sweep, spread
from callbacks.sweep_runs import STATUSES, Run

PIXELS = 480  # width of a sample of images in the page
PICTURES = 24  # at most
HERE = Path(__file__).parent


def page(sweep: Sweep, date: str) -> str:
    """The report of a sweep as HTML.

    Args:
        sweep: as read from its folder.
        date: to stand in it.
    """
    runs = [run for run in sweep.runs if run.record]
    images, without = pictures(sweep.settings), failures(sweep.failed)
    jumps = [("images", "Calibration images", images), ("failures", "Without a result", without)]
    facts = {
        "title": escape(f"Sweep {sweep.folder.resolve().name}"),
        "date": escape(date),
        "line": f'<p class="line">{escape(sweep.plan.command)}</p>' if sweep.plan else "",
        "chips": "".join(
            f'<li class="{status.replace(" ", "-")}"><b>{sweep.count(status)}</b> {status}</li>'
            for status in STATUSES
            if sweep.count(status)
        ),
        "seconds": f"{sum(run.seconds or 0.0 for run in runs):,.0f}",
        "table": table(sweep.settings) if sweep.settings else "<p>No run has finished yet.</p>",
        "plots": plots(sweep.settings),
        "images": images,
        "failures": without,
        "jumps": " ".join(f'<a href="#{name}">{text}</a>' for name, text, there in jumps if there),
        "origin": escape(origin(runs)),
    }
    return Template((HERE / "sweep_page.html").read_text(encoding="utf-8")).substitute(facts)


def origin(runs: Sequence[Run]) -> str:
    """Machines, commits and versions of the runs."""
    machines = dict.fromkeys(str(run.record.get("machine")) for run in runs)
    commits = dict.fromkeys(str(run.record.get("commit")) for run in runs)
    versions = dict.fromkeys(f"torch {run.record['versions'].get('torch')}" for run in runs if "versions" in run.record)
    return f"{'; '.join(machines)} · commit {', '.join(commits)} · {', '.join(versions)}" if runs else ""


def columns(settings: Sequence[Setting]) -> list[tuple[str, Callable[[Setting], str], bool]]:
    """(heading, text of a setting, whether it is a number) of every column; what no run has is left out."""
    keys = list(settings[0].values) if settings else []
    shown: list[tuple[str, Callable[[Setting], str], bool]] = [
        (key, lambda s, key=key: s.values[key] or "", False) for key in keys
    ]
    shown += [
        ("network", lambda s: str(s.facts("teacher", "name") or ""), False),
        ("protocol", lambda s: str(s.runs[0].config.get("protocol", {}).get("name", "")), False),
        ("bits", lambda s: s.widths, False),
        ("images", lambda s: s.images, False),
        ("seeds", lambda s: s.seeds, False),
        ("float %", lambda s: spread(s.metrics("float")), True),
        ("nearest %", lambda s: spread(s.metrics("nearest")), True),
        ("top-1 %", lambda s: spread(s.metrics("quantized")), True),
        ("drop", lambda s: spread(s.drops()), True),
        ("agreement %", lambda s: spread(s.metrics("quantized", "agreement")), True),
        ("KiB", lambda s: "" if s.kib is None else f"{s.kib:.0f}", True),
        ("s a run", lambda s: f"{statistics.mean([r.seconds or 0.0 for r in s.runs]):.1f}", True),
    ]
    taken = {key for key in keys if key in ("bits", "protocol")}
    named = [column for i, column in enumerate(shown) if i < len(keys) or column[0] not in taken]
    return [column for column in named if any(column[1](setting) for setting in settings)]


def table(settings: Sequence[Setting]) -> str:
    """Every setting with its means and deviations; sorted by a click on a heading, or by the list on a telephone."""
    shown = columns(settings)
    head = "".join(
        f'<th scope="col"{" class=n" if number else ""}><button type="button">{escape(name)}</button></th>'
        for name, _, number in shown
    )
    best = max((statistics.mean(s.metrics("quantized")) for s in settings if s.metrics("quantized")), default=None)
    rows = []
    for setting in settings:
        top = setting.metrics("quantized")
        mark = ' class="best"' if top and statistics.mean(top) == best else ""
        cells = "".join(
            f'<td data-label="{escape(name)}"{" class=n" if number else ""}>{escape(text(setting))}</td>'
            for name, text, number in shown
        )
        rows.append(f"<tr{mark}>{cells}</tr>")
    choices = "".join(f'<option value="{i}">{escape(name)}</option>' for i, (name, _, _) in enumerate(shown))
    return (
        f'<p class="sorter"><label>Sort by <select id="sorter"><option value="">as run</option>{choices}</select>'
        f'</label></p><div class="scroll"><table id="results"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def plots(settings: Sequence[Setting]) -> str:
    """Both plots, each for a light and a dark page."""
    drawn = []
    for draw, caption in (
        (
            pareto,
            "Top-1 against size, bars: sample deviation over seeds. No setting beats those on the dotted line.",
        ),
        (heat_map, "Mean top-1 of each method at each pair of widths."),
    ):
        day, night = draw(settings), draw(settings, night=True)
        if day is not None and night is not None:
            drawn.append(figure(day, night, caption))
    return "".join(drawn)


def figure(day: Figure, night: Figure, caption: str) -> str:
    """A drawing that follows the reader's choice of light or dark."""
    light, dark = (inlined(as_svg(each), "svg+xml") for each in (day, night))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(caption)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


def pictures(settings: Sequence[Setting]) -> str:
    """A sample of the images of every generator and network, from the first run that used it."""
    first: dict[tuple[str, str], Path] = {}
    for setting in settings:
        path = setting.runs[0].folder / "images.png"
        if path.exists():
            first.setdefault((str(setting.facts("teacher", "name")), setting.images), path)
    shown = list(first.items())[:PICTURES]
    several = len({network for network, _ in first}) > 1
    drawn = []
    for (network, images), path in shown:
        name = f"{images}, {network}" if several else images
        drawn.append(
            f'<figure><img src="{inlined(reduced(path), "png")}" alt="calibration images: {escape(name)}">'
            f"<figcaption>{escape(name)}</figcaption></figure>"
        )
    left = f"<p>{len(first) - len(shown)} more are in the runs' folders.</p>" if len(first) > len(shown) else ""
    return f"<h2 id=images>Calibration images</h2><div class=samples>{''.join(drawn)}</div>{left}" if drawn else ""


def failures(runs: Sequence[Run]) -> str:
    """What did not come to a result, and why."""
    if not runs:
        return ""
    items = "".join(
        f"<li><code>{escape(run.name)}</code> <span>{escape(run.status)}</span>"
        f"<p>{escape(' '.join(run.overrides))}</p>"
        f"<pre>{escape(run.error or 'no result and no error was left')}</pre></li>"
        for run in runs
    )
    return f"<h2 id=failures>Without a result</h2><ul class=failures>{items}</ul>"


def reduced(path: Path) -> bytes:
    """A picture no wider than the page has room for, in few colours: a report is mailed."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if image.width > PIXELS:
        image = image.resize((PIXELS, round(image.height * PIXELS / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.quantize(128).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def inlined(content: bytes, kind: str) -> str:
    """An image as a `data:` address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
