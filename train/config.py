"""What `cli train` can be told. One field is one option: its annotation is the help text, its default the default."""

from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Literal

KINDS = Literal["spd", "topk", "gated-topk"]
INITS = Literal["expansion", "random"]


@dataclass(frozen=True)
class TrainConfig:
    store: Annotated[Path | None, "Store made by `cli cache` (default: the newest complete one under ./runs)"] = None
    out: Annotated[
        Path | None, "Run folder (default: beside the store, named after layer, kind, init and settings)"
    ] = None
    layers: Annotated[
        str | None, "Layers to train, one run each: 'all', or a list such as 0,2,5-7 (default: the middle one)"
    ] = None
    kind: Annotated[KINDS, "spd: the MLP split into components with learned importances; topk: sparse ReLU transcoder; "
                           "gated-topk: sparse transcoder of the MLP's own gated form"] = "spd"  # fmt: skip
    init: Annotated[INITS, "expansion: copies of the MLP's own neurons; random"] = "expansion"
    expansion: Annotated[int, "Copies of each neuron: the width is expansion times the MLP's"] = 4
    k: Annotated[int, "Active latents per token, for topk and gated-topk"] = 32
    steps: Annotated[int, "Training steps"] = 1000
    batch_size: Annotated[int, "Tokens per step"] = 1024
    lr: Annotated[float | None, "Peak learning rate of Adam (default: measured for each kind and init)"] = None
    sparsity: Annotated[float, "Weight of the smooth L0 of the importances, for spd"] = 1e-3
    noise: Annotated[float, "Noise on the copies, relative to each matrix's standard deviation", "advanced"] = 0.1
    warmup: Annotated[int, "Steps of linear warm-up; then linear decay to 2 %", "advanced"] = 50
    checkpoint_every: Annotated[
        int, "Steps between checkpoints; a stopped run goes on from the last one", "advanced"
    ] = 100
    seed: Annotated[int, "Seed of initialisation, noise and probes"] = 0
    data_seed: Annotated[int, "Seed of the order in which rows are read", "advanced"] = 0
    device: Annotated[str, "auto, cpu, cuda or cuda:N"] = "auto"
    overwrite: Annotated[bool, "Delete the run that is in the way, whatever its configuration, and begin anew"] = False

    def __post_init__(self) -> None:
        for name in ("expansion", "k", "steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1")
        for name in ("noise", "sparsity", "warmup"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be a number that is not negative")
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be from 0 to {2**31 - 1}"
                )
        if self.lr is not None and not 0 < self.lr < inf:
            raise ValueError(f"--lr is {self.lr}: it must be positive and finite")

    def identity(self) -> dict:
        """The options that decide a run's result: not where it lies, what computes it or how often it is saved."""
        unused = "k" if self.kind == "spd" else "sparsity"
        elsewhere = {"store", "out", "overwrite", "device", "checkpoint_every", unused}
        return {name: value for name, value in asdict(self).items() if name not in elsewhere}

    @property
    def layer(self) -> int:
        """The layer of a run's own config, which names exactly one."""
        return int(self.layers)


# Peak rates of Adam at batch 1,024 and 1,500 steps: the best of a grid for each kind and init (README, "Learning rates").
DEFAULT_LR: dict[tuple[str, str], float] = {
    ("spd", "expansion"): 1e-2,
    ("spd", "random"): 1e-2,
    ("topk", "expansion"): 2e-2,
    ("topk", "random"): 4e-2,
    ("gated-topk", "expansion"): 1e-2,
    ("gated-topk", "random"): 2e-2,
}
