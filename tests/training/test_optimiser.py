"""The optimisers: batched Muon is torch's Muon, and several step as one."""

import torch
from torch import nn

from trol.training.optimisers import BatchedMuon, ChainedOptimizer, optimiser, schedule
from trol.training.recipe import Stage


def test_batched_muon_is_torchs_muon_up_to_its_bfloat16() -> None:
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8)]
    mine = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    ours = BatchedMuon(mine, 0.02)
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    for _ in range(5):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        torchs.step()
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() < 5e-3
        assert (a - b).abs().max() < 0.1 * 5 * 0.02


def test_a_schedule_reaches_every_part_and_state_comes_back() -> None:
    layers = nn.ModuleDict({"x": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})})
    model = nn.Sequential(layers["x"], nn.Linear(4, 1))
    stage = Stage(train=("decoder",), data="boards", steps=10, muon=0.1, warmup_steps=2)
    optim = optimiser(model, stage)
    assert isinstance(optim, ChainedOptimizer)
    rates = schedule(optim, stage)
    assert [group["lr"] for part in optim.parts for group in part.param_groups] == [0.05, 0.0005]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.step()
    rates.step()
    assert [group["lr"] for part in optim.parts for group in part.param_groups] == [0.1, 0.001]
    other = optimiser(model, stage)
    other.load_state_dict(optim.state_dict())
    assert [g["lr"] for g in other.param_groups] == [0.1, 0.001]


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    stage = Stage(train=(), data="boards", steps=10, warmup_steps=2, decay=0.5)
    rates = schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), stage)
    (share,) = rates.lr_lambdas
    assert [round(share(step), 3) for step in (0, 1, 5, 6, 9, 10)] == [0.5, 1.0, 1.0, 0.8, 0.2, 0.0]


def test_a_cosine_falls_to_the_final_rate_of_every_group() -> None:
    settings = {"learning_rate": 1e-2, "final_rate": 1e-4, "mixer_learning_rate": 1e-3}
    stage = Stage(train=(), data="boards", steps=10, warmup_steps=2, schedule="cosine", **settings)
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [
        {"params": [weight], "lr": settings[name]}
        for weight, name in zip(weights, ("learning_rate", "mixer_learning_rate"), strict=True)
    ]
    optim = torch.optim.SGD(groups)
    rates = schedule(optim, stage)
    seen = []
    for _ in range(11):
        seen.append([group["lr"] for group in optim.param_groups])
        optim.step()
        rates.step()
    half = 1e-4 + (1e-2 - 1e-4) / 2
    for step, wanted in ((0, 5e-3), (1, 1e-2), (2, 1e-2), (6, half), (10, 1e-4)):
        assert abs(seen[step][0] - wanted) < 1e-9
        assert abs(seen[step][1] - wanted / 10) < 1e-9
    assert seen == sorted(seen[:2]) + sorted(seen[2:], reverse=True)
