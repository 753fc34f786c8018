"""Claims about step 0: before noise each module is what it was copied from, with normalisation on."""

import dataclasses

import pytest
import torch

from cache.weights import MLP
from train import init
from train.config import TrainConfig
from train.modules import TopK, power_of_two
from train.run import build, measure
from train.tensor import augmented, relative_distance


def generator():
    return torch.Generator().manual_seed(0)


def build_at(store, layer=1, mlp=None, **options):
    """Without noise, and with scales that are not 1."""
    mlp = mlp or store.mlp(layer)
    statistics = measure(store, layer)._replace(in_scale=4.0, out_scale=0.25)
    return build(TrainConfig(layers=str(layer), noise=0, **options), mlp, statistics), mlp


def with_biases(mlp: MLP) -> MLP:
    torch.manual_seed(3)
    m, d = mlp.gate.shape
    return dataclasses.replace(mlp, gate_bias=torch.randn(m), up_bias=torch.randn(m), down_bias=torch.randn(d))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("expansion", [1, 4])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
def test_spd_starts_as_the_mlp(store, expansion, activation, biases):
    mlp = dataclasses.replace(store.mlp(1), activation=activation)
    module, mlp = build_at(store, mlp=with_biases(mlp) if biases else mlp, kind="spd", expansion=expansion)
    x = next(store.blocks(1, True)).x
    assert (module(x).reconstruction - mlp(x)).norm() / mlp(x).norm() <= 1e-6
    assert relative_distance(augmented(module.as_mlp()), augmented(mlp)) ** 2 <= 1e-10


def test_spd_starts_as_the_stored_output(store):
    module, _ = build_at(store, kind="spd")
    block = next(store.blocks(1, True))
    half = block.y.half().float()
    assert (module(block.x).reconstruction - half).norm() / half.norm() <= 1e-3


def test_gated_topk_starts_as_the_mlps_own_top_k_neurons(store):
    module, mlp = build_at(store, kind="gated-topk", expansion=3, k=5)
    x = next(store.blocks(1, True)).x
    h = mlp.hidden(x)
    contribution = h.abs() * mlp.down.norm(dim=0)
    kept = torch.zeros_like(h).scatter(1, contribution.topk(5).indices, 1.0)
    expected = (h * kept) @ mlp.down.T
    assert (module(x).reconstruction - expected).norm() / expected.norm() <= 1e-5


def test_at_most_one_sibling_fires(store):
    module = build(
        TrainConfig(layers="1", kind="gated-topk", expansion=3, k=8, noise=0.5), store.mlp(1), measure(store, 1)
    )
    code = module(next(store.blocks(1, True)).x).code
    per_parent = (code != 0).unflatten(1, (-1, 3)).sum(2)
    assert per_parent.max() == 1 and (per_parent.sum(1) == 8).all()
    assert torch.equal(module.parents.unflatten(0, (-1, 3))[:, 0], torch.arange(24))


def test_a_fully_wide_gated_topk_is_the_mlp(store):
    module, mlp = build_at(store, kind="gated-topk", expansion=1, k=24)
    x = next(store.blocks(1, True)).x
    assert torch.allclose(module(x).reconstruction, mlp(x), rtol=1e-4, atol=1e-5)


def test_noise_sums_to_zero_over_siblings(mlp):
    wide = init.expand(mlp.map(torch.Tensor.float), 4, noise=0.3, divide=True, generator=generator())
    for name, scale in (("gate", 1), ("up", 1), ("down", 0.25)):
        rows, original = getattr(wide, name), getattr(mlp, name).float() * scale
        rows, original = (rows.T, original.T) if name == "down" else (rows, original)
        assert torch.allclose(rows.unflatten(0, (-1, 4)).mean(1), original, atol=1e-6)
        spread = (rows - original.repeat_interleave(4, 0)).std() / original.std()
        assert 0.15 < spread < 0.45


def test_zero_sum_noise_moves_the_output_less_than_plain_noise(mlp):
    """Siblings' noise cancels in first order: with E=4 the error falls by about the square of the noise."""
    mlp, x = mlp.map(torch.Tensor.float), torch.randn(500, 6, generator=generator())
    errors = []
    for noise in (0.1, 0.01):
        wide = init.expand(mlp, 4, noise=noise, divide=True, generator=generator())
        errors.append(((wide(x) - mlp(x)).norm() / mlp(x).norm()).item())
    assert errors[0] < 0.05 and errors[1] < errors[0] / 50


def test_one_copy_gets_no_noise(mlp):
    assert torch.equal(init.expand(mlp, 1, noise=0.5, divide=True, generator=generator()).gate, mlp.gate)


def test_latents_read_the_eigenvectors_of_their_neuron(mlp):
    mlp = mlp.map(torch.Tensor.float)
    encoder, decoder = init.latents_of_neurons(mlp, 4, noise=0, generator=generator())
    u, v, p = mlp.gate[2], mlp.up[2], mlp.down[:, 2]
    form = (torch.outer(u, v) + torch.outer(v, u)) / 2
    for latent, sign in enumerate([1, -1, 1, -1]):
        read, write = encoder[2 * 4 + latent], decoder[2 * 4 + latent]
        eigenvalue = (u @ v + sign * u.norm() * v.norm()) / 2
        assert torch.allclose(form @ read, eigenvalue * read, atol=1e-5)
        assert torch.allclose(write, sign * 0.1 * p / p.norm(), atol=1e-6)
    assert torch.allclose(encoder.unflatten(0, (-1, 4)).sum(1), torch.zeros(5, 6), atol=1e-6)


def test_ungated_neurons_are_copied_as_they_are():
    up, down = torch.randn(5, 6), torch.randn(7, 5)
    encoder, decoder = init.latents_of_neurons(MLP("relu", up, down), 2, noise=0, generator=generator())
    assert torch.allclose(encoder[6], up[3] / up[3].norm()) and torch.allclose(
        decoder[6], 0.1 * down[:, 3] / down[:, 3].norm()
    )


def test_topk_as_mlp_is_the_same_function_where_all_fire():
    torch.manual_seed(0)
    module = TopK(torch.randn(8, 6), torch.randn(8, 7), k=8, input_mean=torch.randn(6), output_mean=torch.randn(7),
                  in_scale=4.0, out_scale=0.5)  # fmt: skip
    x = torch.randn(10, 6)
    assert torch.allclose(module.as_mlp()(x), module(x).reconstruction, atol=1e-5)


def test_triples_as_mlp_give_the_original_back(store):
    module, mlp = build_at(store, kind="gated-topk", expansion=1, k=24)
    back = module.as_mlp()
    assert torch.equal(back.gate, mlp.gate) and torch.equal(back.up, mlp.up) and torch.equal(back.down, mlp.down)


@pytest.mark.parametrize("value,expected", [(1.0, 1.0), (1.4, 1.0), (1.5, 2.0), (0.3, 0.25), (6.1, 8.0)])
def test_power_of_two(value, expected):
    assert power_of_two(value) == expected


def test_random_modules_do_not_read_the_weights(store):
    mlp = store.mlp(1)
    other = mlp.map(lambda t: t * 3 + 1)
    for kind in ("topk", "gated-topk", "spd"):
        config = TrainConfig(layers="1", kind=kind, init="random", k=4)
        a, b = (dict(build(config, m, measure(store, 1)).named_parameters()) for m in (mlp, other))
        assert all(torch.equal(a[name], b[name]) for name in a), kind
        assert build(config, mlp, measure(store, 1)).parents is None
