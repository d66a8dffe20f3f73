import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.special

from stages.diffusion import by_name, schedules
from stages.diffusion.schedules import CONTINUOUS, find, names, noise_levels, shared_levels, trained_at, without_signal_at_the_end

TS = (25, 100, 200, 1000)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("T", TS)
def test_alpha_bar_falls_strictly_inside_0_1(name, T):
    alpha_bar = find(name)(T)
    assert alpha_bar.shape == (T,)
    assert alpha_bar.dtype == np.float64
    assert (0 < alpha_bar).all()
    assert (alpha_bar < 1).all()
    assert (np.diff(alpha_bar) < 0).all()


@pytest.mark.parametrize("name", names())
def test_t_0_already_carries_noise_and_the_end_is_nearly_pure_noise(name):
    alpha_bar = find(name)(1000)
    assert 1e-5 < 1 - alpha_bar[0] < 1e-3
    assert alpha_bar[-1] < 1e-4


def test_published_values():
    # Terminal signal rates sqrt(alpha_bar) of Lin et al. 2023, table 1: 0.00635 and 4.93e-5, to the digits printed there.
    assert np.sqrt(find("linear")(1000)[-1]) == pytest.approx(0.00635, abs=5e-6)
    assert np.sqrt(find("cosine")(1000)[-1]) == pytest.approx(4.93e-5, abs=5e-8)


def test_values_are_frozen():
    """A published schedule is never changed: a new one gets a new name, or every trained cell would mean something else."""
    pinned = {
        "linear": [0.999, 0.0741969967, 2.03900898e-05],
        "linear_unscaled": [0.9999, 0.777180083, 0.363563248],
        "cosine": [0.999368718, 0.49384359, 2.42857228e-07],
        "sigmoid": [0.996922714, 0.5, 3.07728596e-06],
    }
    for name, values in pinned.items():
        alpha_bar = find(name)(100)
        assert alpha_bar[[0, 49, 99]] == pytest.approx(values, rel=1e-8), name


def test_a_schedule_is_a_file_found_by_its_name(tmp_path, monkeypatch):
    assert {"linear", "linear_unscaled", "cosine", "sigmoid"} <= set(names())
    (tmp_path / "schedules").mkdir()
    for file in ("b.py", "a.py", "__init__.py", "_c.py", ".d.py", "e-f.py", "g.txt"):
        (tmp_path / "schedules" / file).touch()
    monkeypatch.setattr(by_name, "HERE", tmp_path)
    assert names() == ["a", "b"]
    for unknown in ("cosine", "__init__", "../process"):
        with pytest.raises(ValueError, match=rf"there is no stages/diffusion/schedules/{unknown}.py; allowed: a, b$"):
            find(unknown)


def test_the_levels_of_a_shared_network_are_those_of_their_formula_and_need_no_schedule():
    for how in ({"size": 64, "reference_size": 28}, {"size": 28, "reference_size": None, "zero_terminal_snr": True}):
        np.testing.assert_array_equal(shared_levels(**how), noise_levels("cosine", CONTINUOUS, **how))
    code = "import sys; from stages.diffusion import schedules; schedules.shared_levels(size=28, reference_size=28); "
    code += "print([name for name in sys.modules if name.startswith('stages.diffusion.schedules.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_network_learns_continuous_levels_but_for_the_negative_control_or_where_T_is_given():
    assert {name: trained_at(name, None) for name in names()} == dict.fromkeys(names(), CONTINUOUS) | {"linear_unscaled": 1000}
    assert {trained_at(name, 300) for name in names()} == {300}


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_continuous_levels_are_visited_as_those_of_every_T_are(name):
    """The share of levels below a log-SNR, where networks are trained and samples drawn, moves by a few per cent at T = 100."""
    edges = np.linspace(-8, 8, 33)

    def shares(T):
        a = noise_levels(name, T, size=28, reference_size=28)
        return np.searchsorted(np.sort(np.log(a / (1 - a))), edges) / T

    for T, most in ((100, 0.04), (1000, 0.004)):
        assert np.abs(shares(T) - shares(CONTINUOUS)).max() < most


def test_rescaled_linear_keeps_the_amount_of_noise_whatever_T():
    # The last log-SNR moves by less than 1 from T = 100 to T = 1000; without rescaling it moves by about 9.5.
    def last(name, T):
        a = find(name)(T)[-1]
        return np.log(a / (1 - a))

    assert abs(last("linear", 100) - last("linear", 1000)) < 1
    assert abs(last("linear_unscaled", 100) - last("linear_unscaled", 1000)) > 9


@pytest.mark.parametrize("T", [1, 10, 20])
def test_linear_refuses_small_T(T):
    with pytest.raises(ValueError, match=rf"'linear' needs T > 20, not T = {T}.*'cosine'"):
        find("linear")(T)


@pytest.mark.parametrize("name", names())
def test_T_0_is_refused(name):
    with pytest.raises(ValueError, match="T = 0"):
        find(name)(0)


@pytest.mark.parametrize("name", names())
def test_shift_for_size_multiplies_the_snr(name):
    plain, shifted = find(name)(100), noise_levels(name, 100, size=64, reference_size=28)
    np.testing.assert_allclose(shifted / (1 - shifted), plain / (1 - plain) * 28 / 64, rtol=1e-12)
    np.testing.assert_allclose(noise_levels(name, 100, size=28, reference_size=28), plain, rtol=1e-15)
    assert (np.diff(shifted) < 0).all()


def test_sigmoid_follows_the_published_formula_until_its_last_beta_is_clipped():
    u = np.arange(1, 101) / 100
    falling = (1 / (1 + np.exp(-3.0)) - 1 / (1 + np.exp(3 - 6 * u))) / (1 / (1 + np.exp(-3.0)) - 1 / (1 + np.exp(3.0)))
    np.testing.assert_allclose(find("sigmoid")(100)[:-1], falling[:-1], rtol=1e-10)
    assert falling[-1] == pytest.approx(0, abs=1e-12)
    assert find("sigmoid")(100)[-1] == pytest.approx(find("sigmoid")(100)[-2] * 0.001, rel=1e-9)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("T", TS)
def test_zero_terminal_snr_keeps_the_first_level_and_ends_at_0(name, T):
    before = find(name)(T)
    after = without_signal_at_the_end(before)
    assert after[0] == pytest.approx(before[0], rel=1e-12)
    assert after[-1] == 0
    assert (np.diff(after) < 0).all()
    shifted = noise_levels(name, T, size=64, reference_size=28, zero_terminal_snr=True)
    assert shifted[-1] == 0
    assert (np.diff(shifted) < 0).all()


def test_zero_terminal_snr_of_a_single_step_is_refused():
    with pytest.raises(ValueError, match="T of at least 2"):
        without_signal_at_the_end(find("cosine")(1))


def test_without_a_reference_size_nothing_is_shifted():
    np.testing.assert_allclose(noise_levels("cosine", 50, size=64, reference_size=None), find("cosine")(50), rtol=1e-15)


def test_expit_and_logit_are_scipys_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=5000) * 20, [0.0, -np.inf, 36.0, -709.0]])
    assert np.array_equal(schedules.expit(x), scipy.special.expit(x))
    p = np.concatenate(
        [rng.uniform(size=5000), 1 - 10.0 ** -rng.uniform(0, 12, 1000), 10.0 ** -rng.uniform(0, 300, 1000), [0.0, 0.3, 0.65]]
    )
    assert np.array_equal(schedules.logit(p), [-np.inf if v == 0 else scipy.special.logit(v) for v in p])
