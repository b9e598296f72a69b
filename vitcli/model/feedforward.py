"""The two-layer MLP of a block."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn


class FeedForward(nn.Module):
    """width -> hidden -> width with a GELU between; `gelu` says which of its two forms."""

    def __init__(self, width: int, hidden: int, gelu: Literal["tanh", "exact"], dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.gelu = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        x = self.dropout(self.gelu(self.fc1(x)))
        return self.dropout(self.fc2(x))
