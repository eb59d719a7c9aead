"""Slow, literal forms of what the library computes fast, and counters of tensor operations."""

import itertools

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class CountOperations(TorchDispatchMode):
    "Names of all operations dispatched inside the `with` block."

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def cosine(first: Tensor, second: Tensor) -> Tensor:
    "Cosine of two vectors; 0, without gradient, where one of them is zero."
    if not first.any() or not second.any(): return (first.sum() + second.sum()) * 0
    return (first @ second) / ((first @ first).sqrt() * (second @ second).sqrt())


def mean_or_zero(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values).mean() if values else like.sum() * 0


def pair_loop(layer: Tensor, labels: Tensor, average: str) -> tuple[Tensor, Tensor]:
    "Within and between of one layer, one pair after the other."
    groups = {}
    for i, j in itertools.combinations(range(len(labels)), 2):
        key = tuple(sorted((int(labels[i]), int(labels[j])))) # a class with itself, or two classes
        groups.setdefault(key, []).append(cosine(layer[i], layer[j]))
    same = [values for (a, b), values in groups.items() if a == b]
    different = [values for (a, b), values in groups.items() if a != b]
    means = []
    for kind in (same, different):
        if average == "pairs": means.append(mean_or_zero([value for values in kind for value in values], layer))
        else: means.append(mean_or_zero([torch.stack(values).mean() for values in kind], layer))
    return means[0], means[1]


def slow_mean_cosines(rows: list[Tensor], labels: Tensor, average: str = "pairs") -> tuple[Tensor, Tensor]:
    "Mean over layers of `pair_loop`."
    within, between = zip(*(pair_loop(layer, labels, average) for layer in rows))
    return torch.stack(within).mean(), torch.stack(between).mean()


def gathered_mean_cosines(rows: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    "The same for all pairs alike, in the obvious tensor form: per layer a matrix of cosines, pairs picked by booleans."
    within, between = [], []
    for layer in rows:
        length = layer.norm(dim=1, keepdim=True).clamp(min=1e-12)
        cosines = (layer / length) @ (layer / length).T
        upper = torch.ones_like(cosines).triu(diagonal=1).bool()
        same = labels[:, None] == labels[None, :]
        within.append(cosines[upper & same].mean())
        between.append(cosines[upper & ~same].mean())
    return torch.stack(within).mean(), torch.stack(between).mean()


def set_jaccard(first: Tensor, second: Tensor) -> float:
    "Jaccard index of two boolean vectors by Python sets; two empty sets are alike."
    a, b = (set(mask.nonzero().flatten().tolist()) for mask in (first, second))
    return len(a & b) / len(a | b) if a | b else 1.0


class Tokens(nn.Module):
    "A sequence [B, 16, units]: patches, a token for the class, two linear layers with a sum around them"
    sites = {"relu1": 9, "relu2": 7} # activations and their units

    def __init__(self, classes: int = 4):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 6, 4, stride=4), nn.LayerNorm(6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.up, self.relu1, self.down = nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)
        self.wide, self.relu2, self.head = nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.down(self.relu1(self.up(self.norm(x)) - 0.8))
        return self.head((self.relu2(self.wide(x) - 1.5))[:, 0])


class LastChannels(nn.Module):
    "A map [B, 4, 4, units] between two convolutions, as in a ConvNeXt"
    sites = {"relu1": 9, "relu2": 7}

    def __init__(self, classes: int = 4):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6)
        self.up, self.relu1, self.down = nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)
        self.wide, self.relu2, self.head = nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, classes)

    def forward(self, x):
        x = self.stem(x)
        y = self.down(self.relu1(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1))) - 0.8))
        x = x.permute(0, 2, 3, 1) + y
        return self.head(self.relu2(self.wide(x) - 1.5).mean((1, 2)))
