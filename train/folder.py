"""A run folder: config.json, model.safetensors, history.jsonl, checkpoints/ while it runs, metrics.json when finished.

A run is rebuilt from its folder alone: the config names the kind, the tensors carry every size.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cache.shards import DamagedStore, write_file
from cache.store import read_json
from cache.weights import MLP

from .config import TrainConfig
from .modules import GatedTopK, TopK
from .spd import Spd


class Run(NamedTuple):
    """A finished run."""

    path: Path
    config: TrainConfig
    module: nn.Module
    metrics: dict
    history: list[dict]


def write_config(folder: Path, config: TrainConfig, facts: dict) -> None:
    """`facts` is what the run knows besides its options: the store's digest, the activation, the family."""
    write_file(folder / "config.json", json.dumps({**_plain(config), **facts}, indent=1).encode())


def same_config(folder: Path, config: TrainConfig, facts: dict) -> bool:
    """Whether the folder's run is the one that `config` asks for. See `TrainConfig.identity`."""
    old = read_config(folder)
    return all(old.get(key) == value for key, value in (config.identity() | facts).items())


def read_config(folder: Path) -> dict:
    return read_json(folder / "config.json")


def _plain(config: TrainConfig) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def save_module(folder: Path, module: nn.Module) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    write_file(folder / "model.safetensors", save(tensors))


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and {"kind", "store", "layers"} <= read_config(folder).keys()


def finished(folder: Path) -> bool:
    return (folder / "metrics.json").is_file()


def open_run(folder: Path) -> Run:
    """A finished run; FileNotFoundError says what is missing."""
    folder = Path(folder)
    if not is_run(folder):
        raise FileNotFoundError(f"{folder} is not a run folder: make one with `cli train`")
    if not finished(folder):
        raise FileNotFoundError(f"{folder} is not finished: run the same `cli train` command again and it will go on")
    options = read_config(folder)
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{k: v for k, v in options.items() if k in names})
    config = dataclasses.replace(config, store=Path(options["store"]))
    try:
        tensors = load_file(folder / "model.safetensors")
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    except (SafetensorError, ValueError, FileNotFoundError) as error:
        raise DamagedStore(f"{folder} is damaged ({error}): train it anew with --overwrite") from error
    return Run(folder, config, build(config.kind, tensors, options), read_json(folder / "metrics.json"), history)


def build(kind: str, tensors: dict[str, Tensor], options: dict) -> nn.Module:
    """A module of `kind` that holds `tensors`, for reading: in eval mode, without gradients."""
    scales = {name: tensors[name].item() for name in ("in_scale", "out_scale")} | {"parents": tensors.get("parents")}
    if kind == "topk":
        means = {"input_mean": tensors["input_mean"], "output_mean": tensors["decoder_bias"]}
        module = TopK(tensors["encoder"], tensors["decoder"], k=options["k"], **means, **scales)
    else:
        names = ("gate_bias", "up_bias", "down_bias")
        mlp = MLP(options["activation"], tensors["up"], tensors["down"].T, tensors["gate"],
                  **{name: tensors.get(name) for name in names})  # fmt: skip
        if kind == "spd":
            module = Spd(mlp, output_variance=1.0, **scales)
        else:
            module = GatedTopK(mlp, k=options["k"], family=options["family"], **scales)
    module.load_state_dict(tensors)
    return module.eval().requires_grad_(False)
