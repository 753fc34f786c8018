"""Claims about SPD over triples: the closed forms are the things they stand for."""

import pytest
import torch

from cache.weights import MLP
from train import init, spd
from train.metrics import adversarial
from train.objectives import SpdObjective, Step
from train.tensor import augmented, factors, relative_distance


@pytest.fixture
def case():
    """A noisy expansion (C = 20) with importances of every size, float64: module, inputs, targets."""
    torch.manual_seed(0)
    mlp = MLP(
        "silu", torch.randn(5, 6), torch.randn(6, 5), torch.randn(5, 6), torch.randn(5), torch.randn(5), torch.randn(6)
    )
    wide = init.expand(mlp, 4, noise=0.3, divide=True, generator=torch.Generator().manual_seed(1))
    module = spd.Spd(wide, output_variance=4.0, in_scale=2.0, out_scale=0.5).double()
    with torch.no_grad():
        module.gate_map.normal_(0, 0.5)
        module.self_gate.normal_(0, 0.05)
        module.gate_offset.fill_(0.4)
    x = torch.randn(40, 6).double()
    return module, x, mlp.map(torch.Tensor.double)(x)


def test_closed_form_stochastic_error_is_the_mean_over_masks(case):
    module, x, y = case
    look = module.look(x)
    total, draws = torch.zeros(40).double(), 100_000
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(draws // 1000):
            r = torch.rand(1000, 1, 20, generator=generator, dtype=torch.float64)
            mask = look.importance + (1 - look.importance) * r
            total += (module.decode(look.h * mask) - y).square().sum(2).sum(0)
    closed = spd.stochastic_error(module, look, y)
    assert abs(closed.mean().item() / (total / draws).mean().item() - 1) <= 0.01


def test_adversary_gradient_is_autograds(case):
    module, x, y = case
    look = module.look(x)
    r = torch.rand(20, dtype=torch.float64, requires_grad=True)
    output = module.decode(look.h * (look.importance + (1 - look.importance) * r))
    (output - y).square().sum(1).mean().backward()
    assert torch.allclose(spd.shared_output(module, look, r.detach()), output, rtol=1e-10)
    assert torch.allclose(spd.adversary_gradient(module, look, y, r.detach()), r.grad, rtol=1e-10)


def test_the_adversary_is_no_better_than_the_average_mask(case):
    module, x, y = case
    worst = adversarial(module, x, y)["fvu_adversarial"]
    variance = (y - y.mean(0)).square().sum(1).mean()
    assert worst >= ((module(x).reconstruction - y).square().sum(1).mean() / variance).item()  # r = 0 is a mask too
    assert worst >= (spd.stochastic_error(module, module.look(x), y).mean() / variance).item()


def test_ascent_stays_in_the_box_and_climbs(case):
    module, x, y = case
    look, start = module.look(x), torch.full((20,), 0.5).double()

    def error(r):
        return (spd.shared_output(module, look, r) - y).square().sum(1).mean()

    end = spd.ascend(module, look, y, start, 20)
    assert end.min() >= 0 and end.max() <= 1 and error(end) > error(start)


@pytest.mark.parametrize(
    "s, downhill, uphill",  # gradient that comes through for an incoming -1 (would raise s) and +1
    [(-0.5, -0.01, 0.0), (0.0, -0.01, 0.0), (0.5, -1.0, 1.0), (1.0, -1.0, 1.0), (1.5, 0.0, 0.0)],
)
def test_lower_leaky_gradient_table(s, downhill, uphill):
    for incoming, expected in ((-1.0, downhill), (1.0, uphill)):
        point = torch.tensor(s, requires_grad=True)
        spd.lower_leaky(point).backward(torch.tensor(incoming))
        assert point.grad.item() == pytest.approx(expected, abs=1e-9)
    assert spd.lower_leaky(torch.tensor(s)).item() == min(max(s, 0), 1)


@pytest.mark.parametrize("s, value, slope", [(-1.0, 0.0, 0.0), (0.5, 0.5, 1.0), (2.0, 1.01, 0.01)])
def test_upper_leaky(s, value, slope):
    point = torch.tensor(s, requires_grad=True)
    result = spd.upper_leaky(point)
    result.backward()
    assert (result.item(), point.grad.item()) == pytest.approx((value, slope))


def test_smooth_l0_counts_what_is_well_above_gamma():
    score = torch.tensor([[-3.0, 0.01, 1.0, 1.0]])
    assert spd.smooth_l0(score, 0.01).item() == pytest.approx(0 + 0.5 + 2 / (1 + 1e-4))


def dense(gate, up, down):
    """The symmetrised tensor itself (d_out, d, d)."""
    raw = torch.einsum("cp,ci,cj->pij", down, gate, up)
    return (raw + raw.transpose(1, 2)) / 2


def test_gram_distance_is_the_dense_distance(case):
    mlp = case[0].as_mlp()
    other = MLP("silu", torch.randn(7, 6).double(), torch.randn(6, 7).double(), torch.randn(7, 6).double())
    a, b = (dense(*(part.detach() for part in factors(m))) for m in (mlp, other))
    ratio = (a - b).square().sum() / b.square().sum()
    assert relative_distance(augmented(mlp), augmented(other)) ** 2 == pytest.approx(ratio.item(), rel=1e-10)


def test_probed_distance_has_the_exact_one_as_its_mean(case):
    module, _, _ = case
    target = MLP("silu", torch.randn(5, 6).double(), torch.randn(6, 5).double(), torch.randn(5, 6).double(),
                 torch.randn(5).double(), torch.randn(5).double())  # fmt: skip
    distance = spd.CPDistance(target)
    seen = torch.stack([distance(module, torch.Generator().manual_seed(i)) for i in range(400)]).detach()
    exact = relative_distance(augmented(module.as_mlp()), augmented(target)) ** 2
    assert abs(seen.mean().item() / exact - 1) < 4 * (seen.std() / seen.mean()).item() / 20


def test_autocast_does_not_touch_the_distance(case):
    module = case[0].float()
    distance = spd.CPDistance(module.as_mlp().map(lambda part: part.detach() * 1.001))
    plain = distance(module, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert distance(module, torch.Generator().manual_seed(0)) == plain


def test_only_the_output_bias_is_frozen(case):
    module, _, _ = case
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"down_bias"}


def test_at_step_0_every_mask_is_open_and_every_loss_nearly_0(store):
    from train.config import TrainConfig
    from train.run import build, measure

    mlp = store.mlp(1)
    module = build(TrainConfig(layers="1", noise=0), mlp, measure(store, 1))
    block = next(store.blocks(1, True))
    objective = SpdObjective(module, mlp, sparsity=1e-3)
    _, terms = objective(module, block.x, block.y, Step(0.0, torch.Generator().manual_seed(0)))
    assert terms["l0"] == len(module.gate)
    assert all(terms[name] < 1e-9 for name in ("stochastic", "adversarial", "unmasked", "cp"))


def test_swiglu_even_part_is_half_the_bilinear_map(mlp):
    """S(x) + S(-x) = B(x): what licenses reading a SwiGLU's tensor at all."""
    x = torch.randn(50, 6).double()
    bilinear = ((x @ mlp.gate.T) * (x @ mlp.up.T)) @ mlp.down.T
    assert (mlp(x) + mlp(-x) - bilinear).norm() / bilinear.norm() <= 1e-12
