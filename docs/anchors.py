"""The anchor of a heading: the same one that Quarto gives it, and that nbdev's links to definitions expect."""

import re


def anchor(title: str) -> str:
    "`Masks.union` is #masks.union, `2 classes, in short` is #classes-in-short"
    kept = re.sub(r"[^\w\s.-]", "", title.lower())
    return re.sub(r"\s+", "-", re.sub(r"^[\W\d_]+", "", kept).strip())
