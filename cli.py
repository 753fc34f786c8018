"""The command line: `cli cache`, `cli train`, `cli analyze`. Options come from the config dataclasses, one per field.

This file alone knows typer and rich. It imports no torch before a command runs, so help and usage errors are instant.
"""

import dataclasses
import inspect
import os
import sys
import time
import typing
from collections.abc import Callable
from importlib.metadata import version as package_version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from analyze.config import AnalyzeConfig
from cache.config import CacheConfig
from train.config import TrainConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
errors = Console(stderr=True, soft_wrap=True, highlight=False)
PLAIN_EVERY = 5.0  # seconds between progress lines where there is no terminal


class RateColumn(ProgressColumn):
    """Steps or tokens per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


class Display:
    """Progress: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.task, self.what, self.said, self.started = None, "", 0.0, (0.0, 0)

    def __call__(self, what: str, done: int, total: int, live: dict[str, float] | None = None) -> None:
        text = "  ".join(f"{k} {v:.3g}" for k, v in (live or {}).items() if k in ("loss", "fvu", "l0"))
        if errors.is_terminal:
            self._draw(what, done, total, text)
        else:
            self._say(what, done, total, text)

    def _draw(self, what: str, done: int, total: int, text: str) -> None:
        if self.bar is None:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), RateColumn(),
                TimeRemainingColumn(compact=True), TextColumn("{task.fields[live]}"),
                console=errors, transient=True, expand=True,
            )  # fmt: skip
            self.bar.start()
        if what != self.what:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task, self.what = self.bar.add_task(what, total=total or None, live=text), what
        self.bar.update(self.task, completed=done, total=total or None, live=text)

    def _say(self, what: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if what != self.what:
            self.what, self.started, self.said = what, (now, done), now
            errors.print(f"{what} ...")
        elif total and now - self.said >= PLAIN_EVERY:
            self.said = now
            rate = (done - self.started[1]) / (now - self.started[0])
            left = (total - done) / rate if rate > 0 else float("inf")
            errors.print(
                f"{what}: {done:,} of {total:,} ({done / total:.0%}), {rate:,.0f}/s, {left:.0f} s left  {text}"
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def command(name: str, config_class: type) -> Callable:
    """Register a function of a built config and a progress display as a command whose options are the config's fields."""

    def register(function: Callable) -> Callable:
        def wrapper(**options) -> None:
            try:
                config = config_class(**options)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
            display = Display()
            try:
                lines = function(config, display)
            except KeyboardInterrupt:
                display.close()
                again = "it again without --overwrite" if config.overwrite else "the same command again"
                errors.print(f"stopped; run {again} and it will go on")
                raise typer.Exit(1) from None
            except (ValueError, OSError, FloatingPointError) as error:
                display.close()
                if os.environ.get("EXPANSE_TRACEBACK"):
                    raise
                errors.print(f"[red]error:[/red] {escape(str(error))}")
                raise typer.Exit(1) from error
            display.close()
            for line in lines:
                print(line)

        wrapper.__doc__ = function.__doc__
        wrapper.__signature__ = inspect.Signature(_parameters(config_class))
        return app.command(name)(wrapper)

    return register


def _parameters(config_class: type) -> list[inspect.Parameter]:
    """The first field is the positional argument; a field marked "advanced" goes to a help panel of its own."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    parameters = []
    for number, field in enumerate(dataclasses.fields(config_class)):
        kind, help_text, *marks = typing.get_args(hints[field.name])
        panel = "Advanced" if "advanced" in marks else None
        if number == 0:
            option = typer.Argument(help=help_text, metavar=field.name.upper(), show_default=False)
        else:
            flag = f"--{field.name.replace('_', '-')}"
            option = typer.Option(flag, help=help_text, rich_help_panel=panel, show_default=field.default is not None)
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, option]
            )
        )
    return parameters


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Expanse: take a transformer's MLPs apart, starting from their own weights.

    cache a model's MLP inputs and outputs once, train sparse replacements against them, analyze the trained weights.
    Each command works without arguments; each later one finds what the earlier one wrote under ./runs.
    """
    if version:
        print(package_version("expanse-mlp"))
        raise typer.Exit()


@command("cache", CacheConfig)
def cache_command(config: CacheConfig, display: Display) -> list[str]:
    """Run a model over a text and store every MLP's inputs and outputs."""
    _quiet()
    from cache.run import run

    summary = run(config, display)
    state = "complete already" if summary.reused else "complete"
    return [*summary.lines, f"store {state}: {summary.path}"]


@command("train", TrainConfig)
def train_command(config: TrainConfig, display: Display) -> list[str]:
    """Train sparse replacements of MLPs against a store."""
    _quiet()
    from train.run import run

    lines = []
    for summary in run(config, display):
        found = summary.metrics
        shown = [
            f"{key} {found[key]:.4f}" for key in found if key.startswith(("fvu", "cp_")) and found[key] is not None
        ]
        lines += [
            f"layer {found['layer']} {found['kind']} from {found['init']}, lr {found['lr']:g}, {found['tokens']:,} tokens: "
            f"L0 {found['l0']:.1f}, dead {found['dead_fraction']:.1%}",
            "  held out: " + ", ".join(shown),
            f"run {'finished already' if summary.reused else 'finished'}: {summary.path}",
        ]
    return lines


@command("analyze", AnalyzeConfig)
def analyze_command(config: AnalyzeConfig, display: Display) -> list[str]:
    """Write an eigendecomposition report of a trained run, or of a store's untouched MLP."""
    _quiet()
    from analyze.run import run

    summary = run(config, display)
    return [f"report {'written already' if summary.reused else 'written'}: {summary.path}"]


def _quiet() -> None:
    """Keep the libraries' own bars and warnings off the screen."""
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(app())
