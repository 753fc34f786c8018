"""A small invented vocabulary and MLP that the tests of the report share."""

import torch

from cache.weights import MLP, Norm

D, M = 8, 6
TOKENS = ["<s>", "▁the", "▁cat", "▁sat", "ing", "<0x0A>", "|", "<b>", "▁dog", "s", "▁a", "▁mat"]


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [TOKENS[i] for i in ids]


def make_mlp(*, gated: bool = True, seed: int = 0) -> MLP:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator) / shape[-1] ** 0.5  # noqa: E731
    norm = Norm("rms", 1e-5, torch.linspace(0.5, 2, D))
    gate = draw(M, D) if gated else None
    return MLP("silu" if gated else "relu", draw(M, D), draw(D, M), gate, pre_norm=norm)
