"""What training minimises, one file each: `objective.name` in a recipe is the file's name.

To add an objective, add a file with one subclass of `Objective` whose `name` is the file's. Importing it must not
import torch; its methods may.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitcli.errors import RecipeError
from vitcli.schema import Schema, one_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitcli.model.vit import ViT
    from vitcli.objectives._module import ObjectiveModule


class Objective(Schema):
    """A recipe's `objective`: a loss, and the trained parts that it needs besides the ViT."""

    def check(self, *, multi_label: bool) -> None:
        """Raise RecipeError for data that it does not take; unless it says otherwise, for several labels an image."""
        if multi_label:
            hint = "--set objective.name=classify --set objective.loss=sigmoid"
            raise RecipeError("the images have several labels each, and this objective takes one", hint)

    def parts(self, model: ViT) -> dict[str, nn.Module]:
        """Trained modules besides the ViT, by name; they appear as attributes of the `ObjectiveModule`."""
        return {}

    def constants(self, counts: Sequence[int]) -> dict[str, Tensor]:
        """Tensors that the loss needs, neither trained nor saved, by name, given the images of each class."""
        return {}

    def notes(self, counts: Sequence[int]) -> tuple[str, ...]:
        """What the objective makes of classes with so many images, for a person."""
        return ()

    def losses(self, module: ObjectiveModule, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of a batch, each a mean over its images; "loss" is minimised.

        `batch` holds "images" (b, 3, h, w), normalised, and "targets" (b, classes): of one label an image rows that sum
        to 1, of several 1 for each, both mixed after mixup and cutmix.
        """
        raise NotImplementedError

    def build(self, model: ViT, counts: Sequence[int] = ()) -> ObjectiveModule:
        """The module to train; `.model` is the ViT. `counts` are the images of each class."""
        from vitcli.objectives._module import ObjectiveModule

        return ObjectiveModule(self, model, counts)


AnyObjective: Any = one_of(__name__, Objective)
