"""Wire stage two: read the store, initialise a module, fit it, measure it, leave a run folder."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cache.config import parse_layers
from cache.run import pick_device, require_one_process
from cache.shards import PARTIAL, write_file
from cache.store import Store, read_json
from cache.target import check_out, discard
from cache.weights import MLP

from . import folder as folders
from . import init, metrics, spd
from .batches import Batches
from .config import DEFAULT_LR, TrainConfig
from .loop import Fitted, Progress, fit
from .modules import GatedTopK, TopK, check_k, power_of_two
from .objectives import SpdObjective, TranscoderObjective
from .tensor import augmented, relative_distance


class Summary(NamedTuple):
    """What `cli train` says of one run."""

    path: Path
    reused: bool  # it was finished already
    metrics: dict


class Statistics(NamedTuple):
    """What initialisation reads of a layer's activations: training rows of the store, without the left-out ones."""

    input_mean: Tensor  # (d_in,)
    output_mean: Tensor  # (d_out,)
    output_variance: float  # E|y - mean|^2
    in_scale: float  # power of two nearest the input's root mean square
    out_scale: float  # power of two nearest the output's standard deviation per dimension


def run(config: TrainConfig, on_progress: Progress = lambda what, done, total, live: None) -> list[Summary]:
    """Train what `config` asks for, one run per layer; runs that are finished are left as they are."""
    require_one_process()
    path = config.store or newest_store(Path("runs"))
    store = Store.open(path)
    wanted = str(store.layers[len(store.layers) // 2]) if config.layers is None else config.layers
    for layer in (layers := parse_layers(wanted, store.layers)):
        check(config, store.mlp(layer), layer)
    if config.out is not None and len(layers) > 1:
        raise ValueError(f"--out names one folder and --layers {wanted} are {len(layers)} runs: leave --out away")
    return [
        train_layer(store, dataclasses.replace(config, store=store.path, layers=str(layer)), on_progress)
        for layer in layers
    ]


def newest_store(runs: Path) -> Path:
    """The complete store under `runs` that was finished last."""
    complete = sorted(runs.glob("**/_COMPLETE.json"), key=lambda file: file.stat().st_mtime)
    if not complete:
        raise FileNotFoundError(f"no complete store under ./{runs}: make one with `cli cache`, or name one")
    return complete[-1].parent


def check(config: TrainConfig, mlp: MLP, layer: int) -> None:
    """ValueError for what this MLP cannot be trained with, before anything is written."""
    if config.kind != "topk" and not mlp.gated:
        raise ValueError(f"--kind {config.kind} needs a gated MLP and layer {layer} has none: use --kind topk")
    if config.kind == "topk":
        check_k(config.k, config.expansion * mlp.width)
    if config.kind == "gated-topk":
        check_k(config.k, config.expansion * mlp.width // family(config))


def train_layer(store: Store, config: TrainConfig, on_progress: Progress) -> Summary:
    device = pick_device(config.device)
    config = dataclasses.replace(config, lr=config.lr or DEFAULT_LR[config.kind, config.init])
    mlp = store.mlp(config.layer)
    facts = {"store_digest": store.digest, "activation": mlp.activation, "family": family(config)}
    batches = Batches(store, config.layer, config.batch_size, config.data_seed)
    folder = check_out(config.out or store.path.parent / default_name(config, facts))
    on_progress(f"layer {config.layer}", 0, 0, {})
    if _claim(folder, config, facts):
        return Summary(folder, True, read_json(folder / "metrics.json"))
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no" if device == "cpu" else "bf16")
    statistics = measure(store, config.layer)
    module = build(config, mlp, statistics).to(accelerator.device)
    objective = build_objective(config, module, mlp, statistics).to(accelerator.device)
    folders.write_config(folder, config, facts)
    fitted = fit(module, objective, batches, config=config, folder=folder, accelerator=accelerator,
                 on_progress=on_progress)  # fmt: skip
    on_progress("measuring", 0, 0, {})
    module = accelerator.unwrap_model(module, keep_fp32_wrapper=False).eval()  # measured in fp32 everywhere
    found = _measure_module(module, store, config, mlp, str(accelerator.device)) | _facts(config, fitted)
    folders.save_module(folder, module)
    write_file(folder / "metrics.json", json.dumps(found, indent=1).encode())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Summary(folder, False, found)


def default_name(config: TrainConfig, facts: dict) -> str:
    """Readable first, then a hash of all options, so that two different runs never want one folder."""
    tail = hashlib.sha256(json.dumps(config.identity() | facts, sort_keys=True).encode()).hexdigest()[:6]
    sparse = "" if config.kind == "spd" else f"-k{config.k}"
    return f"{config.layer}-{config.kind}-{config.init}-x{config.expansion}{sparse}-s{config.seed}-{tail}"


def _claim(folder: Path, config: TrainConfig, facts: dict) -> bool:
    """True if `folder` holds this very run, finished. FileExistsError if it holds something else."""
    if folder.is_file():
        raise FileExistsError(f"--out {folder} is a file: choose a folder")
    if not folder.is_dir() or all(entry.name.endswith(PARTIAL) for entry in folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        return False
    if not folders.is_run(folder):
        raise FileExistsError(f"--out {folder} holds something else: choose an empty folder")
    if config.overwrite:
        discard(folder)
        folder.mkdir()
        return False
    if not folders.same_config(folder, config, facts):
        raise FileExistsError(
            f"{folder} holds a run of another configuration: choose another --out, or replace it with --overwrite"
        )
    return folders.finished(folder)


def measure(store: Store, layer: int) -> Statistics:
    _, x_mean, x_square = store.moments(layer, "input")
    _, y_mean, y_square = store.moments(layer, "output")
    variance = y_square - y_mean.square()  # (d_out,)
    return Statistics(
        x_mean.float(), y_mean.float(), variance.sum().item(),
        power_of_two(x_square.mean().sqrt().item()), power_of_two(variance.mean().sqrt().item()),
    )  # fmt: skip


def build(config: TrainConfig, mlp: MLP, statistics: Statistics) -> nn.Module:
    """The module of a config at step 0 (`train.init` says what each tensor gets)."""
    generator = torch.Generator().manual_seed(config.seed)
    width = config.expansion * mlp.width
    scales = {"in_scale": statistics.in_scale, "out_scale": statistics.out_scale, "parents": None}
    if config.init == "expansion":
        scales["parents"] = torch.arange(mlp.width).repeat_interleave(config.expansion)
    if config.kind == "topk":
        if config.init == "expansion":
            rows = init.latents_of_neurons(mlp, config.expansion, noise=config.noise, generator=generator)
        else:
            rows = init.random_latents(width, mlp.up.shape[1], mlp.down.shape[0], generator=generator)
        means = {"input_mean": statistics.input_mean, "output_mean": statistics.output_mean}
        return TopK(*rows, k=config.k, **means, **scales)
    if config.init == "expansion":
        wide = init.expand(mlp, config.expansion, noise=config.noise, divide=config.kind == "spd", generator=generator)
    else:
        norm = width**-0.5 if config.kind == "spd" else init.DECODER_NORM
        wide = init.random_triples(mlp, width, in_scale=statistics.in_scale, out_scale=statistics.out_scale,
                                   down_norm=norm, generator=generator)  # fmt: skip
    if config.kind == "spd":
        return spd.Spd(wide, output_variance=statistics.output_variance, **scales)
    return GatedTopK(wide, k=config.k, family=family(config), **scales)


def family(config: TrainConfig) -> int:
    """How many neighbouring latents share one place among the k: copies of a neuron do, random latents do not."""
    return config.expansion if config.kind == "gated-topk" and config.init == "expansion" else 1


def build_objective(config: TrainConfig, module: nn.Module, mlp: MLP, statistics: Statistics) -> nn.Module:
    if config.kind == "spd":
        return SpdObjective(module, mlp, sparsity=config.sparsity)
    return TranscoderObjective(statistics.output_variance)


def _measure_module(module: nn.Module, store: Store, config: TrainConfig, mlp: MLP, device: str) -> dict:
    found = metrics.evaluate(module, store.blocks(config.layer, held_out=True), device)
    if config.kind == "spd":
        found["cp_distance"] = relative_distance(augmented(module.cpu().as_mlp()), augmented(mlp)) ** 2
    return found


def _facts(config: TrainConfig, fitted: Fitted) -> dict:
    return {
        "layer": config.layer, "kind": config.kind, "init": config.init, "expansion": config.expansion,
        "k": None if config.kind == "spd" else config.k, "lr": config.lr, "seed": config.seed, "steps": config.steps,
        "tokens": config.steps * config.batch_size,
        "tokens_per_second": fitted.tokens / fitted.seconds,
        "waiting_share": fitted.waiting / fitted.seconds,
    }  # fmt: skip
