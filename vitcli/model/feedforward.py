"""The two-layer MLP of a block."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["gelu_tanh", "gelu", "quick_gelu", "swiglu"]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), with which OpenAI trained CLIP."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x * torch.sigmoid(1.702 * x)


class SwiGLU(nn.Module):
    """silu(a) b of the two halves of the channels (arXiv 2002.05202)."""

    def forward(self, x: Float[Tensor, "*b d2"]) -> Float[Tensor, "*b d"]:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


ACTIVATIONS = {
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "swiglu": SwiGLU,
}


class FeedForward(nn.Module):
    """width -> hidden -> width with an activation between."""

    def __init__(self, width: int, hidden: int, activation: Activation, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden if activation == "swiglu" else hidden)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.dropout(self.out(self.dropout(self.hidden(x))))

    def hidden(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h"]:
        """The first layer and the activation, which a runtime may replace by one kernel."""
        return self.activation(self.fc1(x))

    def out(self, x: Float[Tensor, "*b h"]) -> Float[Tensor, "*b d"]:
        """The second layer, whose product a runtime may compute otherwise."""
        return self.fc2(x)
