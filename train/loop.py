"""The training loop: Adam, linear warm-up then linear decay to 2 %, clipping at 1, checkpoints from which a run goes on.

Randomness of a step comes from (seed, step) and the batch from (data seed, step), so nothing but the weights, the
optimiser and the objective's own state has to be kept.
"""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from cache.shards import write_file

from .batches import Batches
from .config import TrainConfig
from .objectives import Step

FINAL_LR = 0.02  # share of the peak rate at the last step
CLIP = 1.0
LOG_EVERY = 10
Progress = Callable[[str, int, int, dict[str, float]], None]


class Fitted(NamedTuple):
    tokens: int
    seconds: float  # of this process, without what a resumed run did before
    waiting: float  # of those, spent reading batches


def learning_rate(step: int, config: TrainConfig) -> float:
    """Share of the peak rate at a step."""
    warmup = min(config.warmup, config.steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - FINAL_LR) * (step + 1 - warmup) / (config.steps - warmup)


def fit(module: nn.Module, objective: nn.Module, batches: Batches, *, config: TrainConfig, folder: Path,
        accelerator: Accelerator, on_progress: Progress) -> Fitted:  # fmt: skip
    """Train `module` in place to `config.steps`, from the folder's checkpoint if there is one.

    FloatingPointError if the loss stops being a number; no checkpoint of such a state is kept.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, config))
    module, objective, optimizer, schedule = accelerator.prepare(module, objective, optimizer, schedule)
    parts = {"module": module, "objective": objective, "optimizer": optimizer, "schedule": schedule}
    first = _restore(folder, parts)
    stream, history = batches.stream(first), open(folder / "history.jsonl", "a")
    started, waiting = time.monotonic(), 0.0
    with history:
        for step in range(first, config.steps):
            asked = time.monotonic()
            x, y = (t.to(accelerator.device) for t in next(stream))
            waiting += time.monotonic() - asked
            where = Step(step / config.steps, torch.Generator().manual_seed(config.seed * 2**32 + step))
            with accelerator.autocast():
                loss, terms = objective(module, x, y, where)
            accelerator.backward(loss)
            norm, lr = accelerator.clip_grad_norm_(trained, CLIP), schedule.get_last_lr()[0]
            optimizer.step(), schedule.step(), optimizer.zero_grad()
            if step % LOG_EVERY == 0 or step == config.steps - 1:
                record = _record(step, loss, terms, norm, lr)
                _check_finite(record, folder)
                history.write(json.dumps(record) + "\n")
                on_progress("training", step + 1, config.steps, record)
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                _check_finite({"step": step, "loss": loss.item()}, folder)  # a broken state is never kept
                history.flush()
                _save(folder, step + 1, parts)
    done = config.steps - first
    return Fitted(done * config.batch_size, time.monotonic() - started, waiting)


def _record(step: int, loss, terms: dict, norm, lr: float) -> dict[str, float]:
    values = {name: term.item() for name, term in terms.items()}
    return {"step": step, "loss": loss.item(), **values, "gradient_norm": norm.item(), "lr": lr}


def _check_finite(record: dict[str, float], folder: Path) -> None:
    for name, value in record.items():
        if not abs(value) < float("inf"):
            raise FloatingPointError(f"{name} is {value} at step {record['step']} of {folder}: try a lower --lr")


def _save(folder: Path, step: int, parts: dict) -> None:
    buffer = io.BytesIO()
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, buffer)
    write_file(folder / "checkpoints" / "last.pt", buffer.getvalue())


def _restore(folder: Path, parts: dict) -> int:
    """Load the checkpoint, if any, and forget the history written after it; the step to go on with."""
    path, step = folder / "checkpoints" / "last.pt", 0
    if path.is_file():
        state = torch.load(path, weights_only=True, map_location="cpu")
        step = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    history = folder / "history.jsonl"
    lines = history.read_text().splitlines() if history.is_file() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
    write_file(history, "".join(line + "\n" for line in kept).encode())
    return step
