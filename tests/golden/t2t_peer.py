"""T2T-ViT in torch under the authors' tensor names: what `t2t_vit_*` is compared with, for timm has none."""

import math

import torch
from torch import nn
from torch.nn import functional as F

SIZES = {  # width, depth, heads, ratio of the MLPs
    "7": (256, 7, 4, 2),
    "10": (256, 10, 4, 2),
    "12": (256, 12, 4, 2),
    "14": (384, 14, 6, 3),
    "19": (448, 19, 7, 3),
    "24": (512, 24, 8, 3),
}


class TokenPerformer(nn.Module):
    def __init__(self, inputs, width, dropout):
        super().__init__()
        self.width = width
        self.kqv = nn.Linear(inputs, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(inputs), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout))
        self.dp = nn.Dropout(dropout)
        self.w = nn.Parameter(torch.zeros(width // 2, width), requires_grad=False)

    def phi(self, u):
        length = (u * u).sum(2, keepdim=True) / 2
        return torch.exp(u @ self.w.t() - length) / math.sqrt(self.w.shape[0])

    def forward(self, x):
        k, q, v = self.kqv(self.norm1(x)).split(self.width, 2)
        k, q = self.phi(k), self.phi(q)
        weights = q @ k.transpose(1, 2)  # N x N in full: another way to the same sums
        y = weights @ v / (weights.sum(2, keepdim=True) + 1e-8)
        x = v + self.dp(self.proj(y))
        return x + self.mlp(self.norm2(x))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """With `outputs` that of a token layer: another width, scaled by the input's, and added to the values."""

    def __init__(self, inputs, heads, outputs=None):
        super().__init__()
        width = outputs or inputs
        self.heads, self.scale, self.skip = heads, (inputs // heads) ** -0.5, outputs is not None
        self.qkv = nn.Linear(inputs, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(2, 3) * self.scale).softmax(3) @ v
        y = self.proj(y.transpose(1, 2).reshape(batch, count, -1))
        return y + v[:, 0] if self.skip else y


class Block(nn.Module):
    def __init__(self, inputs, heads, ratio, outputs=None):
        super().__init__()
        width = outputs or inputs
        self.skip = outputs is None
        self.norm1, self.norm2 = nn.LayerNorm(inputs), nn.LayerNorm(width)
        self.attn = Attention(inputs, heads, outputs)
        self.mlp = Mlp(width, ratio * width)

    def forward(self, x):
        y = self.attn(self.norm1(x))
        x = x + y if self.skip else y
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    def __init__(self, width, kind, dropout):
        super().__init__()
        layer = (lambda n: TokenPerformer(n, 64, dropout)) if kind == "performer" else (lambda n: Block(n, 1, 1, 64))
        self.attention1, self.attention2 = layer(3 * 49), layer(64 * 9)
        self.project = nn.Linear(64 * 9, width)

    def forward(self, x):
        for layer, window in ((self.attention1, (7, 1, 2, 4)), (self.attention2, (3, 1, 1, 2))):
            size, _, padding, stride = window
            sides = [(n + 2 * padding - size) // stride + 1 for n in x.shape[2:]]
            x = layer(F.unfold(x, *window).transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], 64, *sides)
        return self.project(F.unfold(x, 3, 1, 1, 2).transpose(1, 2))


class T2TViT(nn.Module):
    def __init__(self, width, depth, heads, ratio, kind, num_classes, img_size, dropout):
        super().__init__()
        self.tokens_to_token = TokensToToken(width, kind, dropout)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // 16) ** 2, width), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, heads, ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def build(name, *, num_classes, img_size, dropout=0.1):
    """ "t2t_vit_7", "t2t_vit_t_14", ..: with performers, or with transformers for names with _t_."""
    kind = "transformer" if "_t_" in name else "performer"
    return T2TViT(*SIZES[name.split("_")[-1]], kind, num_classes, img_size, dropout)
