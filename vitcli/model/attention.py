"""Multi-head self-attention. How q, k and v meet is a plain function that a runtime may replace."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def fused_attention(
    q: Float[Tensor, "b h n c"], k: Float[Tensor, "b h m c"], v: Float[Tensor, "b h m c"], dropout: float
) -> Float[Tensor, "b h n c"]:
    """softmax(q kᵀ / √c) v by torch's fused kernels; `dropout` is the rate on the weights, 0 outside training."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def explicit_attention(
    q: Float[Tensor, "b h n c"], k: Float[Tensor, "b h m c"], v: Float[Tensor, "b h m c"], dropout: float
) -> Float[Tensor, "b h n c"]:
    """The same, written out: on a CPU in bfloat16 it trains much faster than torch's fused kernel."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ v


class Attention(nn.Module):
    """Self-attention of `heads` heads over `width` channels.

    `attend(q, k, v, dropout)` may be replaced on the instance. `qk_norm` normalises queries and keys of each head
    (arXiv 2302.05442).
    """

    attend: Attend

    def __init__(
        self, width: int, heads: int, qk_norm: bool, norm_eps: float, attention_dropout: float, dropout: float
    ):
        super().__init__()
        self.heads = heads
        self.attend = fused_attention
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.attention_dropout = attention_dropout
        self.dropout = nn.Dropout(dropout)

        # Each of q, k and v is a matrix of its own, (width, width), though they are stored as one.
        for weight in self.qkv.weight.detach().chunk(3):
            nn.init.xavier_uniform_(weight)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Float[Tensor, "b n d"], first: int | None = None) -> Float[Tensor, "b m d"]:
        """All tokens, or only the `first` ones, which attend to all."""
        return self.dropout(self.out(self.mix(x, first)))

    def mix(self, x: Float[Tensor, "b n d"], first: int | None) -> Float[Tensor, "b m d"]:
        """The heads' answers side by side, which a runtime may compute by one kernel."""
        if first is None:
            parts = self.qkv(x).chunk(3, dim=-1)
        else:
            (q_weight, kv_weight), (q_bias, kv_bias) = (
                p.split([x.shape[-1], 2 * x.shape[-1]]) for p in (self.qkv.weight, self.qkv.bias)
            )
            parts = (F.linear(x[:, :first], q_weight, q_bias), *F.linear(x, kv_weight, kv_bias).chunk(2, dim=-1))
        q, k, v = (split_heads(part, self.heads) for part in parts)
        out = self.attend(self.q_norm(q), self.k_norm(k), v, self.attention_dropout if self.training else 0.0)
        return join_heads(out)

    def out(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """The last layer, whose product a runtime may compute otherwise."""
        return self.proj(x)


class AttentionPool(nn.Module):
    """One learned query attends to all tokens, then an MLP: big_vision's MAPHead (arXiv 2106.04560).

    Names follow timm's AttentionPoolLatent.
    """

    def __init__(self, width: int, heads: int, norm_eps: float, mlp: nn.Module):
        super().__init__()
        self.heads = heads
        self.attend: Attend = fused_attention
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, norm_eps)
        self.mlp = mlp

        for weight in (self.latent[0], self.q.weight, *self.kv.weight.detach().chunk(2), self.proj.weight):
            nn.init.xavier_uniform_(weight.detach())
        for linear in (self.q, self.kv, self.proj):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        q = split_heads(self.q(self.latent), self.heads).expand(x.shape[0], -1, -1, -1)
        k, v = (split_heads(part, self.heads) for part in self.kv(x).chunk(2, dim=-1))
        x = self.proj(join_heads(self.attend(q, k, v, 0.0)))
        x = x + self.mlp(self.norm(x))
        return x[:, 0]


def split_heads(x: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b h n c"]:
    """Channels to heads of c = d / h channels."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Float[Tensor, "b h n c"]) -> Float[Tensor, "b n d"]:
    """Heads back to channels."""
    return x.transpose(1, 2).flatten(2)
