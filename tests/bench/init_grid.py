"""Expansion against random initialisation, each at its own best learning rate, several seeds. By hand:

    python tests/bench/init_grid.py runs/stories260k --layer 2

Finished runs are reused, so the command can be stopped and started again. Prints one row per kind, init and rate:
the median held-out FVU over the seeds with its range, the median L0 (TopK modules hold it fixed; compare SPD at equal
L0 only), and a star at the lowest FVU of each kind and init.
"""

import argparse
import itertools
import statistics
from pathlib import Path

import torch

from train.config import TrainConfig
from train.run import run

RATES = [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--layer", default="2")
    parser.add_argument("--kinds", nargs="+", default=["topk", "gated-topk"])
    parser.add_argument("--inits", nargs="+", default=["expansion", "random"])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for kind, init in itertools.product(arguments.kinds, arguments.inits):
        found = {}
        for lr in arguments.rates:
            configs = [
                TrainConfig(store=arguments.store, layers=arguments.layer, kind=kind, init=init, lr=lr,
                            steps=arguments.steps, seed=seed)
                for seed in arguments.seeds
            ]  # fmt: skip
            found[lr] = [run(config)[0].metrics for config in configs]
        medians = {lr: statistics.median(run["fvu"] for run in runs) for lr, runs in found.items()}
        for lr, runs in found.items():
            star = "*" if medians[lr] == min(medians.values()) else " "
            fvus, l0 = [run["fvu"] for run in runs], statistics.median(run["l0"] for run in runs)
            spread = f"{medians[lr]:.4f}  [{min(fvus):.4f}, {max(fvus):.4f}]"
            print(f"{kind:11} {init:10} lr {lr:<7g} {spread}  L0 {l0:.1f} {star}", flush=True)


if __name__ == "__main__":
    main()
