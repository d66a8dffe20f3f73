"""Weights to begin a training with: those of another network, as far as they fit."""

from typing import Any

from torch import Tensor, nn

from stages.errors import UserError

OF_CLASSES = ("embed_label.", "template.pictures")  # a row for each class
OF_PIXELS = ("stem.", "bypass.", "head.")  # as many channels as a patch has pixels


def take(net: nn.Module, class_names: list[str], prediction: str, weights: dict[str, Tensor], about: dict[str, Any]) -> list[str]:
    """Set the weights of a network to those of another; the parts that keep their own, for they do not fit.

    What is of the classes stays unless these are the same, and what touches pixels where a patch has another size. All else
    must fit.

    Args:
        class_names: those of `net`.
        prediction: what `net` predicts.
        weights: of the other network, by name.
        about: what its file says of it: `class_names`, `network`, `diffusion`.

    Raises:
        UserError: it is a network of another shape, or predicts something else.
    """
    if prediction != (other := about["diffusion"]["prediction"]):
        raise UserError(
            f"train.init names a network that predicts {other}, this one is to predict {prediction}: diffusion.prediction"
        )
    own = net.state_dict()
    kept = OF_CLASSES if about["class_names"] != class_names else ()
    fits = {
        name: tensor
        for name, tensor in weights.items()
        if name in own and own[name].shape == tensor.shape and not name.startswith(kept)
    }
    left = [name for name in own if name not in fits]
    wrong = [name for name in left if not name.startswith(OF_CLASSES + OF_PIXELS)] + [name for name in weights if name not in own]
    if wrong:
        raise UserError(
            f"train.init names a network of another shape: {wrong[0]} does not fit; it needs network = {about['network']}"
        )
    net.load_state_dict(own | fits)
    return list(dict.fromkeys(name.partition(".")[0] for name in left))
