"""Weights to begin with fit another network as far as they can, and a network of another shape is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stages.errors import UserError
from stages.networks.unet import UNet
from stages.training.beginning import take

NETWORK: dict[str, Any] = {
    "stem_resolution": 8,
    "base_channels": 8,
    "channel_mult": [1, 2],
    "blocks_per_level": 1,
    "attention_levels": [],
    "conditional": True,
}


def network(seed: int, classes: int, size: int = 8, **changes: Any) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet(size=size, num_classes=classes, **(NETWORK | changes))
        for weight in net.parameters():  # some begin at zero, in every network
            torch.nn.init.normal_(weight)
        return net


def about(class_names: str) -> dict[str, Any]:
    return {"class_names": list(class_names), "network": NETWORK, "diffusion": {"prediction": "v"}}


def taken(net: UNet, before: dict[str, Tensor], other: UNet) -> tuple[set[str], set[str]]:
    """The parts whose weights are those of the other network now, and those that stayed as before."""
    given, now = other.state_dict(), net.state_dict()
    of_other = {name.partition(".")[0] for name in now if name in given and torch.equal(now[name], given[name])}
    stayed = {name.partition(".")[0] for name in now if torch.equal(now[name], before[name])}
    return of_other, stayed


def test_a_network_of_the_same_classes_is_taken_whole() -> None:
    net, other = network(0, 3), network(1, 3)
    assert take(net, list("abc"), "v", other.state_dict(), about("abc")) == []
    assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(("classes", "names"), [(5, "abcde"), (3, "xyz")])
def test_of_other_classes_all_but_the_tables_of_labels_is_taken(classes: int, names: str) -> None:
    net, other = network(0, classes), network(1, 3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert take(net, list(names), "v", other.state_dict(), about("abc")) == ["embed_label", "template"]
    of_other, stayed = taken(net, before, other)
    assert stayed == {"embed_label", "template"}  # of the template only its pictures are of the classes
    assert of_other == {name.partition(".")[0] for name in before} - {"embed_label"}
    assert torch.equal(net.template.gain.weight, other.template.gain.weight)


def test_of_larger_images_what_touches_pixels_stays() -> None:
    net, other = network(0, 3, size=16), network(1, 3, size=8)
    assert take(net, list("abc"), "v", other.state_dict(), about("abc")) == ["stem", "bypass", "head"]
    assert torch.equal(net.middle.conv1.weight, other.middle.conv1.weight)


@pytest.mark.parametrize("change", [{"base_channels": 16}, {"blocks_per_level": 2}, {"conditional": False}, {"channel_mult": [1]}])
@pytest.mark.parametrize("mine", [True, False])
def test_a_network_of_another_shape_is_refused_and_nothing_is_set(change: dict[str, Any], mine: bool) -> None:
    net, other = network(0, 3, **(change if mine else {})), network(1, 3, **({} if mine else change))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UserError, match=r"train.init names a network of another shape: \S+ does not fit; it needs network = "):
        take(net, list("abc"), "v", other.state_dict(), about("abc"))
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)


def test_a_network_that_predicts_something_else_is_refused() -> None:
    net, other = network(0, 3), network(1, 3)
    with pytest.raises(UserError, match=r"predicts v, this one is to predict eps: diffusion.prediction"):
        take(net, list("abc"), "eps", other.state_dict(), about("abc"))
