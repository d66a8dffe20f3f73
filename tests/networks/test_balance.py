import torch

from stages.networks.balance import PARTS, Balance

T = 1000


def steps(balance, error_at, count):
    """Weighted errors of batches in which every t has the error that error_at gives it, those of the last batch."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(count):
        t = torch.randint(0, T, (256,), generator=rng)
        weighted = balance(error_at(t), t)
    return weighted


def test_every_noise_level_comes_to_count_alike():
    uneven = steps(Balance(T), lambda t: 0.1 + 5.0 * (t * PARTS // T % 3), 400)
    torch.testing.assert_close(uneven, uneven.mean().expand(256), rtol=1e-4, atol=0)


def test_the_weights_are_one_in_the_mean_and_begin_as_one():
    balance = Balance(T)
    errors, t = torch.rand(256) + 0.5, torch.randint(0, T, (256,))
    assert torch.equal(balance(errors, t), errors)
    steps(balance, lambda t: 1.0 + t / 100, 200)
    weights = balance(torch.ones(T), torch.arange(T))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0), rtol=0.01, atol=0)  # the parts are of 31 or of 32 levels
    assert weights[0] > 5 * weights[-1]


def test_the_weights_are_one_in_the_mean_where_there_are_fewer_levels_than_parts():
    balance = Balance(8)
    for _ in range(200):
        balance(torch.linspace(0.1, 2, 8), torch.arange(8))
    weighted = balance(torch.ones(8), torch.arange(8))
    torch.testing.assert_close(weighted.mean(), torch.tensor(1.0))
    assert weighted[0] > 10 * weighted[-1]


def test_the_weights_know_no_gradient():
    net = torch.nn.Parameter(torch.ones(4))
    balance = Balance(4)
    balance(net.square(), torch.arange(4)).sum().backward()
    torch.testing.assert_close(net.grad, 2 * net.detach())
    assert not balance.sums.requires_grad


def test_its_state_goes_on_where_it_stood():
    first, second = Balance(T), Balance(T)
    steps(first, lambda t: 1.0 + t, 20)
    second.load_state_dict(first.state_dict())
    errors, t = torch.rand(64), torch.randint(0, T, (64,))
    assert torch.equal(first(errors, t), second(errors, t))
