import dataclasses

import pytest

from stages.training.recipe import learning_rate


def test_learning_rate_warms_up_and_falls_to_zero_late(recipe):
    rates = [learning_rate(step, 8, recipe) / recipe.lr for step in range(1, 10)]
    assert rates == pytest.approx([1 / 2, *((left / 8) ** 0.5 for left in range(7, -1, -1))])


def test_learning_rate_may_be_halved_every_so_many_images(recipe):
    recipe = dataclasses.replace(recipe, halve_lr_every=16, warmup_images=0)  # two steps of 8
    rates = [learning_rate(step, 8, recipe) / recipe.lr for step in range(1, 9)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
