"""Open what a report is about: a finished run with the store it was trained on, or one layer of a store."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cache.store import Store
from cache.weights import MLP
from train.folder import Run, finished, is_run, open_run
from train.tensor import CPTensor

from .config import AnalyzeConfig
from .spaces import Space, choose_space


@dataclass(frozen=True)
class Subject:
    """What a report is about."""

    store: Store
    layer: int
    mlp: MLP
    run: Run | None
    copy: MLP | None  # the module's weights as an MLP
    space: Space

    @property
    def tensor(self) -> CPTensor | None:
        """The tensor whose spectra are shown, in the report's coordinates: the module's, else the MLP's, else none."""
        for mlp in (self.copy, self.mlp):
            if mlp is not None and mlp.gated:
                tensor = CPTensor.of_mlp(mlp)
                return tensor if self.space.gain is None else tensor.fold(self.space.gain)
        return None

    @property
    def null_terms(self) -> int:
        """Terms of a random tensor to compare with: copies of one neuron count once."""
        parents = None if self.run is None else getattr(self.run.module, "parents", None)
        copied = self.copy is None or not self.copy.gated or parents is not None
        return self.mlp.width if copied else self.copy.width


def open_subject(config: AnalyzeConfig) -> Subject:
    path = config.path or newest_run(Path("runs"))
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a run folder or a store")
    if is_run(path):
        run = open_run(path)
        if config.layer not in (None, run.config.layer):
            raise ValueError(
                f"--layer is {config.layer} and {path} is a run on layer {run.config.layer}: leave --layer out"
            )
        store, layer, copy = open_store_of(run), run.config.layer, run.module.as_mlp()
    else:
        run, copy, store = None, None, Store.open(path)
        layer = store.layers[len(store.layers) // 2] if config.layer is None else config.layer
    mlp = store.mlp(layer)
    check_weights(mlp, f"layer {layer} of {store.path}")
    if copy is not None:
        check_weights(copy, f"run {path}")
    return Subject(store, layer, mlp, run, copy, choose_space(mlp))


def newest_run(runs: Path) -> Path:
    """The run under `runs` that was finished last."""
    done = [file for file in runs.glob("**/metrics.json") if finished(file.parent) and is_run(file.parent)]
    if not done:
        raise FileNotFoundError(f"no finished run under ./{runs}: make one with `cli train`, or name a run or a store")
    return max(done, key=lambda file: file.stat().st_mtime).parent


def open_store_of(run: Run) -> Store:
    """The store a run was trained on, where it was then or beside the run."""
    beside = run.path.resolve().parent / Path(run.config.store).name
    for path in (run.config.store, beside):
        if path.exists():
            store = Store.open(path)
            break
    else:
        raise FileNotFoundError(
            f"{run.path} was trained on {run.config.store}, which is gone: put it back, or cache it again"
        )
    trained_on = json.loads((run.path / "config.json").read_text()).get("store_digest", store.digest)
    if trained_on != store.digest:
        raise ValueError(f"{store.path} has changed since {run.path} was trained on it: train again, or restore it")
    return store


def check_weights(mlp: MLP, where: str) -> None:
    for field in dataclasses.fields(mlp):
        value = getattr(mlp, field.name)
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise ValueError(
                f"{field.name} of {where} holds NaN or infinity: it cannot be analysed, train or cache it again"
            )
