"""The models, batches and losses that every engine is timed on; each builds the same thing from the same seed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenLoss(nn.Module):
    """Mean cross-entropy over a record's tokens, then over records: (B, T, V) logits, (B, T) targets.

    ``reduction`` is an attribute because two-pass engines switch it to ``"none"``.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        tokens = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        records = tokens.view(targets.shape).mean(1)
        return records if self.reduction == "none" else records.mean()


@dataclass(frozen=True)
class Workload:
    """``build`` gives (model, x, y, criterion), seeded; ``batch`` is the number of records."""

    title: str
    batch: int
    build: Callable[[], tuple[nn.Module, Tensor, Tensor, nn.Module]]
    lr: float = 1e-3


def _images(batch: int, *shape: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, *shape), torch.randint(classes, (batch,))


# ------------------------------------------------------------------------------------------------------------- MLP


def mlp() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return model, *_images(256, 784), nn.CrossEntropyLoss()


# ------------------------------------------------------------------------------------------------------------- WRN


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(16, inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm2 = nn.GroupNorm(16, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        skip = x if self.short is None else self.short(h)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(h))))


def wide_resnet() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    """WRN-16-4 (Zagoruyko, Komodakis 2016) with GroupNorm(16), as private image training uses it."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    inside = 16
    for width, stride in ((64, 1), (128, 2), (256, 2)):
        layers += [_Block(inside, width, stride), _Block(width, width, 1)]
        inside = width
    layers += [nn.GroupNorm(16, inside), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10)]
    return nn.Sequential(*layers), *_images(32, 3, 32, 32), nn.CrossEntropyLoss()


# ---------------------------------------------------------------------------------------------------- transformers


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            f(x).view(b, t, self.heads, d // self.heads).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(h.transpose(1, 2).reshape(b, t, d))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Transformer(nn.Module):
    """Positions are looked up once for each record, from an index that is a tensor of its own: peers can run that."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int, classes: int | None):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(_Layer(width, heads, classes is None) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary if classes is None else classes, bias=classes is not None)
        if classes is None:
            self.head.weight = self.token.weight
        self.pooled = classes is not None
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).repeat(ids.shape[0], 1)
        h = self.norm(self.layers(self.token(ids) + self.position(places)))
        return self.head(h.mean(1) if self.pooled else h)


def encoder() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    torch.manual_seed(0)
    model = _Transformer(8192, 128, 384, 4, 6, classes=10)
    return model, torch.randint(8192, (16, 128)), torch.randint(10, (16,)), nn.CrossEntropyLoss()


def gpt() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    torch.manual_seed(0)
    model = _Transformer(8192, 256, 384, 4, 6, classes=None)
    ids = torch.randint(8192, (4, 257))
    return model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), TokenLoss()


# -------------------------------------------------------------------------------------------------------- optional


class _Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(200_000, 64)
        self.head = nn.Linear(64, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).mean(1))


def bag() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    torch.manual_seed(0)
    return _Bag(), torch.randint(200_000, (64, 50)), torch.randint(2, (64,)), nn.CrossEntropyLoss()


class _Lora(nn.Module):
    """A frozen linear layer plus a trainable product of two thin ones (Hu et al. 2022), each a layer of its own."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def lora() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    model, x, y, criterion = encoder()
    model.requires_grad_(False)
    for layer in model.layers:
        attention = layer.attention
        for name in ("query", "key", "value", "out"):
            setattr(attention, name, _Lora(getattr(attention, name), 16))
    model.head.requires_grad_(True)
    return model, x, y, criterion


def tanh_cnn() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    """The network of Tramèr and Boneh 2021 for 28×28 images, at one physical batch of 512."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, 2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip
    return model, *_images(512, 1, 28, 28), nn.CrossEntropyLoss()


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(128, 256, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    torch.manual_seed(0)
    return _Lstm(), *_images(32, 64, 128), nn.CrossEntropyLoss()


WORKLOADS = {
    "mlp": Workload("MLP 784-1024-1024-10, B 256", 256, mlp),
    "wrn": Workload("WRN-16-4 (GroupNorm) on 32×32, B 32", 32, wide_resnet),
    "encoder": Workload("encoder 4×384, vocabulary 8192, T 128, B 16", 16, encoder),
    "gpt": Workload("GPT 4×384 tied, vocabulary 8192, T 256, B 4", 4, gpt),
    "embedding": Workload("embedding 200k×64, T 50, B 64", 64, bag),
    "lora": Workload("LoRA r 16 on the frozen encoder, B 16", 16, lora),
    "tanhcnn": Workload("tanh CNN of Tramèr and Boneh, B 512", 512, tanh_cnn),
    "lstm": Workload("LSTM 128-256, T 64, B 32", 32, lstm),
}
MAIN = ("mlp", "wrn", "encoder", "gpt")
