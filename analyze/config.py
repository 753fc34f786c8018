"""What one analysis is asked for. No torch here: the command line reads this file for its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated


@dataclass(frozen=True)
class AnalyzeConfig:
    """Settings of one report; every field is an option of `cli analyze` under its own name."""

    path: Annotated[Path | None, "Run folder or store (default: the newest finished run under ./runs)"] = None
    out: Annotated[
        Path | None, "Report folder (default: `report` in the run folder; `report/LAYER` beside a store)"
    ] = None
    layer: Annotated[int | None, "Layer, when PATH is a store (default: the middle one)"] = None
    directions: Annotated[str, "Output directions, comma-separated: hosvd:N (the top N), token:STRING, component:N"] = (
        "hosvd:4"
    )
    top: Annotated[int, "Eigenpairs shown at each end of a spectrum"] = 4
    contexts: Annotated[int, "Top contexts shown per eigenpair"] = 5
    tokens: Annotated[int, "Tokens read at most, of the training and of the held-out rows each"] = 65536
    seed: Annotated[int, "Seed of the random-weight nulls"] = 0
    overwrite: Annotated[bool, "Replace an existing report of another configuration"] = False

    def __post_init__(self) -> None:
        for name, least in {"top": 1, "contexts": 0, "tokens": 2, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be at least {least}")
        if not self.directions.strip():
            raise ValueError("--directions is empty: give for example hosvd:4, token:the or component:0")
