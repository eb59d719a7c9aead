"""Slow, literal forms of what the library computes fast, and counters of tensor operations."""

import itertools

import torch
from torch import Tensor
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
