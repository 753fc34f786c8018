"""Turn one dict into a report: report.json is the dict, the pages and figures are drawn from it and from nothing else.

Everything is written to a folder beside the target and renamed into place at the end: a report exists completely or
not at all.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from safetensors.torch import save
from torch import Tensor

from cache.target import discard

from . import figures

PAGE, DATA, CONFIG = "report.html", "report.json", "config.json"
DECIMALS = ((0.01, 5), (0.1, 4), (1, 3), (10, 2), (100, 1))  # below this size, so many decimals
MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_|<>[]"})


def clean(value: Any) -> Any:
    """The same structure as plain JSON values: what is not a finite number becomes None."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def number(value: float | int | None) -> str:
    """A number as every table shows it: three significant digits, or all the digits of an integer or before the point."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    size = abs(value)
    if value != 0 and (size < 1e-3 or size >= 1e6):
        text = f"{value:.2e}"
    else:
        decimals = next((d for limit, d in DECIMALS if size < limit), 0) if value else 0
        text = f"{value:,.{decimals}f}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def write(folder: Path, report: dict[str, Any], arrays: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """Write a whole report to `folder`, replacing what is there; returns the page's path."""
    report = clean(report)
    with replacing(folder) as new:
        (new / "figures").mkdir()
        (new / DATA).write_text(json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False), encoding="utf-8")
        (new / CONFIG).write_text(json.dumps(clean(config), indent=1), encoding="utf-8")
        (new / "arrays.safetensors").write_bytes(save(arrays))  # save_file's 0600 would keep it from colleagues
        drawn = draw(report, new / "figures")
        for name in (PAGE, "report.md"):
            text = _environment().get_template(f"{name}.j2").render(report=report, figures=drawn)
            (new / name).write_text(text, encoding="utf-8")
    return folder / PAGE


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `folder` if the block ends well, and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.partial")  # one name, so that what a killed run left is cleared here
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if folder.exists():
            discard(folder)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def draw(report: dict[str, Any], folder: Path) -> dict[str, Markup]:
    """All figures as files, and their SVG for the page by name."""
    drawn = {}
    for name, figure in _figures(report):
        drawn[name] = Markup(figures.save(figure, folder, name))
    return drawn


def _figures(report: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    rungs = report["ladder"]["rungs"]
    yield "ladder", figures.ladder([rung["name"] for rung in rungs], [rung["r2"] for rung in rungs])
    for i, direction in enumerate(report["directions"]):
        yield f"spectrum-{i}", figures.spectrum(direction["values"], direction["null_values"], direction["shown"])
        curves = {f"{name}, n = {c['tokens']:,}": c["correlation"] for name, c in direction["truncation"].items()}
        yield f"truncation-{i}", figures.truncation(curves)
    if report["hosvd"]:
        yield "hosvd", figures.hosvd(report["hosvd"]["share"], report["hosvd"]["null_share"])
    components = report["components"]
    if components and components["siblings"]:
        columns = components["columns"]
        yield "parents", figures.component_scatter(columns["cos_parent"], columns["firing"])
        siblings = [value for value in columns["cos_sibling"] if value is not None]
        if siblings:
            yield "siblings", figures.sibling_histogram(siblings)
    if report["history"]:
        yield "history", figures.history(report["history"]["step"], report["history"]["series"])


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("analyze", package_path=""),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "md": lambda text: str(text).translate(MARKDOWN)}
    return environment
