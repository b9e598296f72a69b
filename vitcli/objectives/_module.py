"""An objective as a module: what is compiled, sharded, trained and saved."""

from collections.abc import Sequence

from torch import Tensor, nn

from vitcli.model.vit import ViT
from vitcli.objectives import Objective


class ObjectiveModule(nn.Module):
    """An objective round a ViT; `.model` is the ViT, further trained parts and constants stand beside it by name."""

    model: ViT

    def __init__(self, objective: Objective, model: ViT, counts: Sequence[int]):
        super().__init__()
        self.objective = objective
        self.model = model
        for name, part in objective.parts(model).items():
            self.add_module(name, part)
        for name, tensor in objective.constants(counts).items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of a batch, each a mean over its images; "loss" is minimised."""
        return self.objective.losses(self, batch)
