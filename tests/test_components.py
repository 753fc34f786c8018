"""Claims about the component table: cosines of terms are those of the dense tensors."""

import pytest
import torch

from analyze.components import describe, sibling_cosine, term_cosine
from cache.weights import MLP
from invented import M, make_mlp
from train.init import expand, latents_of_neurons


def test_cosine_of_terms_is_that_of_their_dense_tensors():
    a, b = (make_mlp(seed=s).map(torch.Tensor.double) for s in (0, 1))

    def dense(mlp, i):
        raw = torch.einsum("o,a,b->oab", mlp.down[:, i], mlp.gate[i], mlp.up[i])
        return ((raw + raw.transpose(1, 2)) / 2).flatten()

    i, j = torch.tensor([0, 2, 5]), torch.tensor([1, 2, 0])
    expected = [torch.cosine_similarity(dense(a, x), dense(b, y), 0) for x, y in zip(i, j, strict=True)]
    torch.testing.assert_close(term_cosine(a, i, b, j), torch.stack(expected))


def test_fresh_copies_have_cosine_one_to_parent_and_siblings():
    mlp, parents, generator = make_mlp(), torch.arange(M).repeat_interleave(2), torch.Generator()
    wide = expand(mlp, 2, noise=0.0, divide=True, generator=generator)
    columns = describe(wide, mlp, torch.zeros(2 * M), parents)
    ones = torch.ones(2 * M, dtype=torch.float64)
    torch.testing.assert_close(columns.cos_parent, ones)
    torch.testing.assert_close(columns.cos_sibling, ones)
    encoder, decoder = latents_of_neurons(mlp, 4, noise=0.0, generator=generator)
    latents = MLP("relu", encoder, decoder.T)
    four = torch.arange(M).repeat_interleave(4)
    torch.testing.assert_close(
        describe(latents, mlp, torch.zeros(4 * M), four).cos_parent, ones.repeat(2), atol=1e-6, rtol=0
    )


def test_nearest_sibling_is_looked_for_in_the_family_alone():
    mlp = make_mlp().map(torch.Tensor.double)
    parents = torch.tensor([0, 1, 0, 2, 0, 1])
    found = sibling_cosine(mlp, parents)
    every = torch.tensor(
        [[float(term_cosine(mlp, torch.tensor([i]), mlp, torch.tensor([j]))) for j in range(M)] for i in range(M)]
    )
    for c in range(M):
        family = [j for j in range(M) if j != c and parents[j] == parents[c]]
        assert found[c].isnan() if not family else found[c] == pytest.approx(float(every[c, family].max()))
