"""Classification: one label an image, or a mixture of labels after mixup and cutmix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

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

    def losses(self, module: ObjectiveModule, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"loss"} of a batch: images (b, 3, h, w), targets (b, classes).

        A model without pooling gives logits (b, tokens, classes): each token is held to the image's target.
        """
        from torch.nn import functional as F

        logits, targets = module.model(batch["images"]).float(), batch["targets"]
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / targets.shape[-1]
        if logits.ndim == 3:
            targets = targets[:, None].expand_as(logits)
        if self.loss == "softmax":
            loss = -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()
        else:
            loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1).mean()
        return {"loss": loss}
