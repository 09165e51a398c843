"""Networks in PyTorch: timm's, torchvision's, and twins of those networks of jaxsd that neither of them has.

Nothing of jaxsd is imported, so that an interpreter with PyTorch alone runs it. What the twins start with is PyTorch's
default or zero: neither times nor comparisons with tensors loaded into both depend on it.
"""

import functools
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


def conv_norm(inputs, outputs, size=1, stride=1, *, dilation=1, groups=1, activation=True):
    """Convolution, batch norm and (with `activation`) ReLU: "conv" and "norm"."""
    conv = nn.Conv2d(inputs, outputs, size, stride, dilation * (size // 2), dilation, groups, bias=False)
    layers = OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs))
    if activation:
        layers["activation"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


class BlurPool(nn.Module):
    """Every second position of the map smoothed by (1, 2, 1) / 4 both ways, its borders reflected (Zhang 2019)."""

    def __init__(self, channels):
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.outer(line, line).expand(channels, 1, 3, 3).clone()
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x):
        """x [B, C, H, W], of sides of 2 or more, to [B, C, ceil(H / 2), ceil(W / 2)]."""
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.kernel, stride=2, groups=x.shape[1])


def pool_of(stride, channels):
    """The blur pool that takes the place of a stride of 2; nothing for a stride of 1."""
    return BlurPool(channels) if stride == 2 else nn.Identity()


class SelectiveKernel(nn.Module):
    """A 3x3 and a 3x3 of dilation 2, mixed channel by channel (SKNet, Li et al. 2019)."""

    def __init__(self, channels, stride, groups):
        super().__init__()
        squeezed = max(channels // 16, 32)
        self.path1 = conv_norm(channels, channels, 3, groups=groups)
        self.path2 = conv_norm(channels, channels, 3, dilation=2, groups=groups)
        self.reduce = conv_norm(channels, squeezed)
        self.select = nn.Conv2d(squeezed, 2 * channels, 1, bias=False)
        self.pool = pool_of(stride, channels)

    def forward(self, x):
        """x [B, C, H, W] to [B, C, ceil(H / stride), ceil(W / stride)]."""
        first, second = self.pool(self.path1(x)), self.pool(self.path2(x))
        seen = first.mean((2, 3), keepdim=True) + second.mean((2, 3), keepdim=True)
        for_first, for_second = self.select(self.reduce(seen)).chunk(2, 1)
        return torch.lerp(second, first, (for_first - for_second).sigmoid())  # the softmax over two paths


class Branch(nn.Sequential):
    """A bottleneck up to its last norm, whose middle is a selective kernel."""

    def __init__(self, inputs, width, stride, groups):
        inner = 2 * width
        layers = OrderedDict(
            layer1=conv_norm(inputs, inner),
            layer2=SelectiveKernel(inner, stride, groups),
            layer3=conv_norm(inner, 4 * width, activation=False),
        )
        super().__init__(layers)


class Unit(nn.Module):
    """relu(shortcut(x) + lam F1(x) + (1 - lam) F2(x)): lam is 0 or 1 for each image in training, else 1/2."""

    def __init__(self, inputs, width, stride, groups):
        super().__init__()
        self.branch1, self.branch2 = (Branch(inputs, width, stride, groups) for _ in range(2))
        self.pool, self.shortcut = nn.Identity(), nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.pool = pool_of(stride, inputs)
            self.shortcut = conv_norm(inputs, 4 * width, activation=False)

    def forward(self, x):
        """x [B, C, H, W] to [B, 4 width, ceil(H / stride), ceil(W / stride)]."""
        first, second = self.branch1(x), self.branch2(x)
        if self.training:
            lam = torch.randint(2, (len(x), 1, 1, 1)).to(x)
            y = torch.lerp(second, first, lam)
        else:
            y = (first + second) / 2
        return F.relu_(self.shortcut(self.pool(x)) + y)


class DSKResNeXt50(nn.Module):
    """DSK-ResNeXt-50 32x4d of VIPF (2020) with the ImageNet stem; its modules are called as in jaxsd."""

    def __init__(self, *, num_classes):
        super().__init__()
        self.stem = conv_norm(3, 64, 7, 2)
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), BlurPool(64))
        inputs = 64
        for i, (depth, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
            units = OrderedDict()
            for n in range(depth):
                units[f"unit{n + 1}"] = Unit(inputs, width, 2 if i and not n else 1, groups=32)
                inputs = 4 * width
            self.add_module(f"block{i + 1}", nn.Sequential(units))
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x):
        """Images [B, 3, H, W] of 64 pixels or more to logits [B, num_classes]."""
        x = self.pool(self.stem(x))
        x = self.block4(self.block3(self.block2(self.block1(x))))
        return self.head(x.mean((2, 3)))


class TokenPerformer(nn.Module):
    """A token layer of linear attention by random features, as in the authors' code."""

    def __init__(self, inputs, width, dropout):
        super().__init__()
        self.width = width
        self.kqv = nn.Linear(inputs, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(inputs), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout))
        self.dp = nn.Dropout(dropout)
        self.register_buffer("w", torch.randn(width // 2, width))

    def phi(self, u):
        """u [B, N, d] to its positive random features [B, N, d / 2]."""
        length = (u * u).sum(2, keepdim=True) / 2
        return torch.exp(u @ self.w.t() - length) / self.w.shape[0] ** 0.5

    def forward(self, x):
        """x [B, N, C] to [B, N, width]."""
        k, q, v = self.kqv(self.norm1(x)).split(self.width, 2)
        k, q = self.phi(k), self.phi(q)
        total = q @ k.sum(1).unsqueeze(2)
        y = q @ (k.transpose(1, 2) @ v) / (total + 1e-8)
        x = v + self.dp(self.proj(y))
        return x + self.mlp(self.norm2(x))


class Mlp(nn.Module):
    """Two dense layers with a GELU between them."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        """x [B, N, width] to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention. With `outputs` that of a token layer: another width, added to the values."""

    def __init__(self, inputs, heads, outputs=None):
        super().__init__()
        width = outputs or inputs
        self.heads, self.scale, self.skip = heads, (inputs // heads) ** -0.5, outputs is not None
        self.qkv = nn.Linear(inputs, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        """x [B, N, inputs] to [B, N, width]; the scale is that of the inputs, in a token layer too."""
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        y = self.proj(y.transpose(1, 2).reshape(batch, count, -1))
        return y + v[:, 0] if self.skip else y


class Block(nn.Module):
    """Attention and MLP, each behind its norm and with a residual."""

    def __init__(self, inputs, heads, ratio, outputs=None):
        super().__init__()
        width = outputs or inputs
        self.skip = outputs is None
        self.norm1, self.norm2 = nn.LayerNorm(inputs), nn.LayerNorm(width)
        self.attn = Attention(inputs, heads, outputs)
        self.mlp = Mlp(width, ratio * width)

    def forward(self, x):
        """x [B, N, inputs] to [B, N, width]."""
        y = self.attn(self.norm1(x))
        x = x + y if self.skip else y
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Windows, a token layer, windows of its map, another one, windows again and a dense layer."""

    def __init__(self, width, transformer, dropout):
        super().__init__()
        layer = (lambda n: Block(n, 1, 1, 64)) if transformer else (lambda n: TokenPerformer(n, 64, dropout))
        self.attention1, self.attention2 = layer(3 * 49), layer(64 * 9)
        self.project = nn.Linear(64 * 9, width)

    def forward(self, x):
        """Images [B, 3, H, W] to tokens [B, H / 16 * W / 16, width]."""
        for layer, window in ((self.attention1, (7, 1, 2, 4)), (self.attention2, (3, 1, 1, 2))):
            size, _, padding, stride = window
            sides = [(n + 2 * padding - size) // stride + 1 for n in x.shape[2:]]
            x = layer(F.unfold(x, *window).transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], 64, *sides)
        return self.project(F.unfold(x, 3, 1, 1, 2).transpose(1, 2))


class T2TViT(nn.Module):
    """T2T-ViT (Yuan et al. 2021) under the authors' tensor names, with performers or with transformers.

    Positions and random features are no parameters here. `dropout` is that of the performers, published 0.1.
    """

    def __init__(self, width, depth, heads, ratio, transformer=False, *, num_classes, img_size, dropout=0.1):
        super().__init__()
        self.tokens_to_token = TokensToToken(width, transformer, dropout)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", torch.zeros(1, 1 + (img_size // 16) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        """Images [B, 3, img_size, img_size] to logits [B, num_classes]."""
        x = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


TWINS = {
    "dsk_resnext50_32x4d": DSKResNeXt50,
    "t2t_vit_7": functools.partial(T2TViT, 256, 7, 4, 2),
    "t2t_vit_10": functools.partial(T2TViT, 256, 10, 4, 2),
    "t2t_vit_12": functools.partial(T2TViT, 256, 12, 4, 2),
    "t2t_vit_14": functools.partial(T2TViT, 384, 14, 6, 3),
    "t2t_vit_19": functools.partial(T2TViT, 448, 19, 7, 3),
    "t2t_vit_24": functools.partial(T2TViT, 512, 24, 8, 3),
    "t2t_vit_t_14": functools.partial(T2TViT, 384, 14, 6, 3, transformer=True),
}


def build(name, classes, resolution, cifar_stem=False):
    """A network in training mode: timm's by its name, torchvision's as "tv:NAME", one of TWINS as "own:NAME".

    Nothing random is in it but what the twins always have: dropout and stochastic depth are off. cifar_stem: a 3x3
    convolution of stride 1 in the place of a ResNet's stem and its pooling.
    """
    library, _, plain = name.rpartition(":")
    if library == "own":
        if plain not in TWINS:
            raise ValueError(f"no twin {plain!r}: choose from {', '.join(TWINS)}")
        model = _sized(TWINS[plain], classes, resolution)
    elif library == "tv":
        model = load_torchvision().models.get_model(plain, num_classes=classes)
        _still(model)
    else:
        load_torchvision()
        import timm

        model = _sized(functools.partial(timm.create_model, name), classes, resolution)
    if cifar_stem:
        if not isinstance(getattr(model, "conv1", None), nn.Conv2d):
            raise ValueError(f"{name} has no stem of one convolution to change: leave --cifar-stem away")
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model.train()


def _sized(make, classes, resolution):
    try:
        return make(num_classes=classes, img_size=resolution)
    except TypeError:  # convolutional networks are not told the side of the images
        return make(num_classes=classes)


def _still(model):
    """torchvision's dropout and stochastic depth, which are on by default, switched off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0


@functools.cache
def load_torchvision():
    """The module torchvision, with a PyTorch for CPUs only too.

    A torchvision that was built for CUDA cannot load its operators there, and stops at two that it looks up by name.
    Declared, they are found; no network here uses them.
    """
    try:
        import torchvision
    except RuntimeError:
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
        import torchvision
    return torchvision
