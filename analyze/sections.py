"""The sections of a report as plain dicts: from tensors and ladders to what report.json holds. No wording here but names."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from train.tensor import CPTensor, cosine, inner, relative_distance, squared_norm

from .components import Components
from .surrogates import Ladder
from .tensor import functional_cosine

COLUMNS = ("size", "cos_uv", "cos_up", "cos_vp", "firing", "parent", "cos_parent", "cos_sibling")
TOGETHER = 0.9  # siblings count as together while their terms' cosine is above this
METRICS = {
    "fvu": "variance unexplained, module as used",
    "fvu_unmasked": "every component fully open",
    "fvu_rounded": "importances above 0 set to 1",
    "fvu_stochastic": "masks drawn between importance and 1",
    "fvu_adversarial": "worst shared mask that ascent found: a lower bound",
    "cp_distance": "‖ΔT‖²/‖T‖² to the original tensor",
    "l0": "active components per token",
    "l0_0.1": "of them, importance above 0.1",
    "alive": "components that fired at least once",
    "dead_fraction": "share that never fired",
    "rows": "held-out tokens measured",
    "rows_adversarial": "of them, under the adversary",
    "tokens_per_second": "training speed",
    "waiting_share": "training time spent reading",
}
SETTINGS = ("kind", "init", "expansion", "k", "lr", "steps", "tokens", "seed", "layer")


def ladder_section(ladder: Ladder) -> dict[str, Any]:
    gates = ladder.mean_gates
    quantiles = None
    if gates is not None:
        levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=gates.dtype)
        quantiles = dict(zip(("q05", "q25", "q50", "q75", "q95"), gates.quantile(levels).tolist(), strict=True))
    return {
        "rungs": [asdict(rung) for rung in ladder.rungs],
        "scale": ladder.scale,
        "mean_gate_quantiles": quantiles,
        "energy": None if ladder.energy is None else asdict(ladder.energy),
        "fitted_tokens": ladder.fitted_tokens,
        "held_out_tokens": ladder.held_out_tokens,
    }


def similarity_section(spaces: dict[str, tuple[CPTensor, CPTensor]]) -> list[dict[str, Any]]:
    """Trained tensor against the original one, once per space of coordinates."""
    rows = []
    for name, (trained, original) in spaces.items():
        angle = cosine(trained, original)
        rows.append(
            {
                "space": name,
                "cosine": angle,
                "functional_cosine": functional_cosine(trained, original),
                "relative_distance": relative_distance(trained, original),
                "scale": float(inner(trained, original) / squared_norm(original)),
                "distance_at_best_scale": max(0.0, 1 - angle**2) ** 0.5,
            }
        )
    return rows


def metrics_section(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """metrics.json in two parts: the numbers that were measured, the known ones first, and what they were measured of."""
    order = [*(name for name in METRICS if name in metrics), *(name for name in metrics if name not in METRICS)]
    measured = [name for name in order if name not in SETTINGS and isinstance(metrics[name], int | float)]
    return {
        "metrics": {name: metrics[name] for name in measured},
        "meanings": {name: METRICS.get(name) for name in measured},
        "settings": {name: metrics[name] for name in SETTINGS if metrics.get(name) is not None},
    }


def hosvd_section(sigma: Tensor, null_sigma: Tensor, labels: list[dict | None]) -> dict[str, Any]:
    """Singular values of the output unfolding; `labels` belong to the first directions."""
    shares, null = (values.square() / values.square().sum() for values in (sigma, null_sigma))

    def needed(squares: Tensor, share: float) -> int:
        return int((squares.cumsum(0) < share * (1 - 1e-12)).sum()) + 1

    return {
        "sigma": sigma.tolist(),
        "share": shares.tolist(),
        "null_share": null.tolist(),
        "for_half": needed(shares, 0.5),
        "for_90": needed(shares, 0.9),
        "null_for_half": needed(null, 0.5),
        "null_for_90": needed(null, 0.9),
        "labels": labels,
    }


def component_section(components: Components, rows: int = 50) -> dict[str, Any]:
    """Columns for all components, and the numbers of those shown: the ones that fire most."""
    columns = {name: getattr(components, name) for name in COLUMNS}
    order = components.firing.argsort(descending=True, stable=True)[:rows]
    return {
        "count": len(components.size),
        "never_fired": int((components.firing == 0).sum()),
        "columns": {name: None if column is None else column.tolist() for name, column in columns.items()},
        "shown": order.tolist(),
        "siblings": _siblings(components),
    }


def _siblings(components: Components) -> dict[str, Any] | None:
    """How far the copies have come from their parents and from each other."""
    if components.cos_parent is None:
        return None
    known = components.cos_sibling[~components.cos_sibling.isnan()]
    away = components.cos_parent < TOGETHER
    return {
        "threshold": TOGETHER,
        "median_cos_parent": float(components.cos_parent.median()),
        "left_parent": float(away.double().mean()),
        "median_cos_sibling": float(known.median()) if len(known) else None,
        "left_siblings": float((known < TOGETHER).double().mean()) if len(known) else None,
    }


def history_section(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Training curves: every quantity of history.jsonl that varies, over steps."""
    if len(history) < 2:
        return None
    names = dict.fromkeys(name for line in history for name in line)
    series = {name: [line.get(name) for line in history] for name in names if name not in ("step", "time", "seconds")}
    numeric = {
        name: values
        for name, values in series.items()
        if all(value is None or isinstance(value, int | float) for value in values) and len(set(values)) > 1
    }
    return {"step": [line.get("step", i) for i, line in enumerate(history)], "series": numeric} if numeric else None
