"""Two small models with random weights: a vision transformer and a language model.

They stand in for Qwen2.5-VL's: patches of 14 pixels, 2 x 2 patches merged into one token, 2-d
rotary positions in the vision part, 3-d ones (mrope) in the language part, grouped-query
attention, SwiGLU. Width and token counts are real, the depth is not: two layers each, so that a
processor without accelerator answers within seconds.

- Weights come from a seed: two processes that name the same seed hold the same model.
- Greedy, float32 and, with `torch.set_num_threads(1)`, the same bits in every process of one
  machine. That is what lets a launcher compare what crossed the pool with a run in one process.
- They have learned nothing: the tokens they generate mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, scaled_dot_product_attention, silu

ROPE_BASE = 10_000.0
# Of random weights, in units of 1 / sqrt(inputs). At 1 attention is nearly the same for all tokens,
# and no single one changes the answer; at 2 one wrong row of an image mostly does.
SPREAD = 2.0


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer's sizes. `head width` (width / heads) must be a multiple of four."""

    width: int = 1280
    heads: int = 16
    mlp: int = 3420
    depth: int = 2
    out: int = 3584
    patch: int = 14  # pixels
    merge: int = 2  # patches on each side of a token
    window: int = 8  # patches on each side of an attention window

    @property
    def pixels_per_token(self) -> int:
        """How many pixels on each side become one token."""
        return self.patch * self.merge


@dataclass(frozen=True)
class LanguageConfig:
    """A language model's sizes. `head` must be a multiple of 16 (three parts of mrope)."""

    hidden: int = 3584
    heads: int = 8
    kv_heads: int = 2
    head: int = 128
    mlp: int = 2048
    depth: int = 2
    vocab: int = 4096


# ------------------------------------------------------------------------------ what both use


class RMSNorm(nn.RMSNorm):
    """Scale each token to length one."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


def linear(width: int, out: int) -> nn.Linear:
    return nn.Linear(width, out, bias=False)


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = linear(width, inner), linear(width, inner)
        self.down = linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(silu(self.gate(x)) * self.up(x))
        return out


def frequencies(count: int) -> Tensor:
    return ROPE_BASE ** -(torch.arange(count) / count)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: x is [tokens, heads, head], angles is [tokens, head / 2]."""
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """[tokens, heads, head] each -> [tokens, heads * head]."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.squeeze(0).transpose(0, 1).flatten(1)


Model = TypeVar("Model", bound=nn.Module)


def with_seeded_weights(model: Model, seed: int) -> Model:
    """Give a model made on the meta device its weights, the same ones for the same seed."""
    model.to_empty(device="cpu").requires_grad_(False).eval()
    random = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim == 1:  # a norm's scale
            weight.fill_(1.0)
        else:
            weight.normal_(std=SPREAD * weight.shape[-1] ** -0.5, generator=random)
    return model


# ------------------------------------------------------------------------ vision transformer


def to_patches(image: Tensor, config: VisionConfig) -> tuple[Tensor, Tensor]:
    """[3, height, width] -> patches [n, 3 * patch * patch] and their (row, column) [n, 2].

    The patches of one token are neighbours, so that merging them is a reshape.
    """
    rows, columns = (side // config.pixels_per_token for side in image.shape[1:])
    sides = (rows, config.merge, config.patch, columns, config.merge, config.patch)
    patches = image.reshape(3, *sides).permute(1, 4, 2, 5, 0, 3, 6)  # a token's four together
    grid = torch.cartesian_prod(
        torch.arange(rows * config.merge), torch.arange(columns * config.merge)
    )
    grid = grid.reshape(rows, config.merge, columns, config.merge, 2).transpose(1, 2)
    return patches.reshape(-1, 3 * config.patch**2), grid.reshape(-1, 2)


class VisionAttention(nn.Module):
    """Attention over the patches of each window, or over all when there is one window."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = linear(config.width, 3 * config.width)
        self.out = linear(config.width, config.width)

    def forward(self, x: Tensor, angles: Tensor, windows: list[int]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        q, k = rotate(q, angles), rotate(k, angles)
        parts = zip(*(torch.split(t, windows) for t in (q, k, v)), strict=True)
        out: Tensor = self.out(torch.cat([attend(*part) for part in parts]))
        return out


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm_attention, self.attention = RMSNorm(config.width), VisionAttention(config)
        self.norm_mlp, self.mlp = RMSNorm(config.width), GatedMLP(config.width, config.mlp)

    def forward(self, x: Tensor, angles: Tensor, windows: list[int]) -> Tensor:
        x = x + self.attention(self.norm_attention(x), angles, windows)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class VisionTransformer(nn.Module):
    """Image -> one embedding for each 28 x 28 pixels. All layers but the last see windows only."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        merged = config.width * config.merge**2
        self.patch = linear(3 * config.patch**2, config.width)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self.merge_in, self.merge_out = linear(merged, merged), linear(merged, config.out)

    @classmethod
    def seeded(cls, config: VisionConfig, seed: int) -> VisionTransformer:
        with torch.device("meta"):
            model = cls(config)
        return with_seeded_weights(model, seed)

    @torch.inference_mode()
    def forward(self, image: Tensor) -> Tensor:
        patches, grid = to_patches(image, self.config)
        order, windows = self._windows(grid)
        x, angles = self.patch(patches)[order], self._angles(grid)[order]
        for layer in self.layers[:-1]:
            x = layer(x, angles, windows)
        x = self.layers[-1](x, angles, [len(x)])
        x = self.norm(x)[order.argsort()]
        out: Tensor = self.merge_out(gelu(self.merge_in(x.reshape(-1, self.merge_in.in_features))))
        return out

    def _windows(self, grid: Tensor) -> tuple[Tensor, list[int]]:
        """The order that makes each window's patches neighbours, and each window's length."""
        row, column = (grid // self.config.window).unbind(1)
        window = row * (int(column.max()) + 1) + column
        counts: list[int] = window.bincount().tolist()
        return window.argsort(stable=True), counts

    def _angles(self, grid: Tensor) -> Tensor:
        """Half of each head turns with the row, half with the column."""
        quarter = frequencies(self.config.width // self.config.heads // 4)
        return (grid.unsqueeze(2) * quarter).flatten(1)


# --------------------------------------------------------------------------- language model


def token_table(config: LanguageConfig, seed: int) -> Tensor:
    """Embeddings of the text tokens, [vocab, hidden]: on both sides, hence a seed of its own."""
    random = torch.Generator().manual_seed(seed)
    return torch.empty(config.vocab, config.hidden).normal_(generator=random)


class CausalAttention(nn.Module):
    """Grouped-query attention, mrope, and a cache of everything it has seen."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.head, self.groups = config.head, config.heads // config.kv_heads
        self.q = linear(config.hidden, config.heads * config.head)
        self.k = linear(config.hidden, config.kv_heads * config.head)
        self.v = linear(config.hidden, config.kv_heads * config.head)
        self.out = linear(config.heads * config.head, config.hidden)

    def forward(self, x: Tensor, angles: Tensor, cache: list[Tensor]) -> Tensor:
        q, k, v = (part(x).unflatten(1, (-1, self.head)) for part in (self.q, self.k, self.v))
        new = torch.stack([rotate(k, angles), v])
        cache[:] = [torch.cat([*cache, new], dim=1)]
        k, v = cache[0].repeat_interleave(self.groups, dim=2)
        out: Tensor = self.out(attend(rotate(q, angles), k, v, causal=len(x) > 1))
        return out


class LanguageLayer(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.norm_attention, self.attention = RMSNorm(config.hidden), CausalAttention(config)
        self.norm_mlp, self.mlp = RMSNorm(config.hidden), GatedMLP(config.hidden, config.mlp)

    def forward(self, x: Tensor, angles: Tensor, cache: list[Tensor]) -> Tensor:
        x = x + self.attention(self.norm_attention(x), angles, cache)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class LanguageModel(nn.Module):
    """Embeddings of a prompt -> the tokens that follow it, the likeliest each time."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(LanguageLayer(config) for _ in range(config.depth))
        self.norm, self.logits = RMSNorm(config.hidden), linear(config.hidden, config.vocab)
        self.table = torch.empty(0)

    @classmethod
    def seeded(cls, config: LanguageConfig, seed: int) -> LanguageModel:
        with torch.device("meta"):
            model = cls(config)
        model = with_seeded_weights(model, seed + 1)
        model.table = token_table(config, seed)
        return model

    @torch.inference_mode()
    def generate(self, prompt: Tensor, positions: Tensor, delta: int, count: int) -> list[int]:
        """`count` tokens after a prompt of [n, hidden] embeddings at [3, n] mrope positions.

        `delta` is the mrope position delta: token number i of the text that follows stands at
        position i + delta, since an image's tokens share positions.
        """
        caches: list[list[Tensor]] = [[] for _ in self.layers]
        tokens = [self._next(prompt.float(), positions, caches)]
        for index in range(len(prompt), len(prompt) + count - 1):
            last = embedding(torch.tensor(tokens[-1:]), self.table)
            tokens.append(self._next(last, torch.full((3, 1), index + delta), caches))
        return tokens

    def _next(self, x: Tensor, positions: Tensor, caches: list[list[Tensor]]) -> int:
        angles = self._angles(positions)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, angles, cache)
        return int(self.logits(self.norm(x[-1:])).argmax())

    def _angles(self, positions: Tensor) -> Tensor:
        """A quarter of each head turns with time, the rest with height and with width."""
        half = self.config.head // 2
        parts = [half // 4, half * 3 // 8, half * 3 // 8]
        angles = positions.unsqueeze(2) * frequencies(half)
        axes = enumerate(torch.split(angles, parts, dim=2))
        return torch.cat([part[axis] for axis, part in axes], dim=1)
