"""Classification: one label an image or several, or a mixture of them after mixup and cutmix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vitcli.errors import RecipeError
from vitcli.objectives import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from vitcli.objectives._module import ObjectiveModule


class Classify(Objective):
    """Cross-entropy, or a sigmoid for each class as in the ImageNet-21k recipes."""

    name: Literal["classify"] = "classify"
    loss: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="sigmoid is summed over the classes, as big_vision"
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    class_weights: Literal["none", "inverse", "effective"] = Field(
        "none", description="what an image counts: 1 / images of its class, or 1 / their effective number"
    )

    def check(self, *, multi_label: bool) -> None:
        """Several labels an image need a loss whose classes do not exclude one another, and have no one weight."""
        if multi_label and self.loss != "sigmoid":
            message = (
                f"the images have several labels each, and in objective.loss: {self.loss} classes exclude one another"
            )
            raise RecipeError(message, "--set objective.loss=sigmoid")
        if multi_label and self.class_weights != "none":
            message = (
                f"objective.class_weights: {self.class_weights} weighs an image by its class, and these have several"
            )
            hint = "--set objective.class_weights=none; for rare classes more often: --set data.sampling=repeat_factor"
            raise RecipeError(message, hint)

    def constants(self, counts: Sequence[int]) -> dict[str, Tensor]:
        """{"class_weights"} (classes,)."""
        import torch

        return {} if self.class_weights == "none" else {"class_weights": torch.tensor(self._weights(counts))}

    def notes(self, counts: Sequence[int]) -> tuple[str, ...]:
        """The range of the class weights."""
        if self.class_weights == "none":
            return ()
        weights = [weight for weight in self._weights(counts) if weight]
        return (f"{self.class_weights} class weights: an image counts {min(weights):.3g} to {max(weights):.3g}",)

    def _weights(self, counts: Sequence[int]) -> list[float]:
        """1 in the mean over the images; a class without images has 0.

        The effective number of n images is (1 - b^n) / (1 - b), here with b = 1 - 1 / (images of a mean class)
        (arXiv 1901.05555).
        """
        seen, images = sum(count > 0 for count in counts), sum(counts)
        base = 1 - seen / max(images, 2 * seen)
        size = (lambda n: (1 - base**n) / (1 - base)) if self.class_weights == "effective" else float
        weights = [1 / size(count) if count else 0.0 for count in counts]
        mean = sum(weight * count for weight, count in zip(weights, counts, strict=True)) / images
        return [weight / mean for weight in weights]

    def losses(self, module: ObjectiveModule, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"loss"} of a batch: images (b, 3, h, w), targets (b, classes).

        A model without pooling gives logits (b, tokens, classes): each token is held to the image's target.
        """
        from torch.nn import functional as F

        logits, targets = module.model(batch["images"]).float(), batch["targets"]
        weights = targets @ module.get_buffer("class_weights") if self.class_weights != "none" else None
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / targets.shape[-1]
        if logits.ndim == 3:
            targets = targets[:, None].expand_as(logits)
        if self.loss == "softmax":
            losses = -(targets * F.log_softmax(logits, dim=-1)).sum(-1)
        else:
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
        if weights is not None:
            losses = losses * (weights[:, None] if losses.ndim == 2 else weights)
        return {"loss": losses.mean()}
