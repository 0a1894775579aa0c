"""The colours of pictures; models' are those of Okabe and Ito, which most colour-blind people can tell apart."""

from __future__ import annotations

MODELS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c8c8c")
SEQUENTIAL = ("#eef4fb", "#d6e6f4", "#b5d3ea", "#8dbfdf", "#62a6d1", "#3f8ac1", "#256eab", "#12528d", "#083468")
SEQUENTIAL_DARK = ("#172c42", "#193755", "#1b4670", "#1f5a91", "#2f72ad", "#4a8dc4", "#70a9d8", "#9cc6e8", "#d0e5f7")
DIVERGING = ("#b2351f", "#cf6249", "#e4937c", "#f3c5b5", "#ececec", "#bcd7ea", "#83b5d8", "#4b8fbf", "#1f6aa0")
DIVERGING_DARK = ("#f0795f", "#d05f48", "#a44a38", "#6e372d", "#33383d", "#2b4a61", "#316b91", "#4690c0", "#74b9e4")


def ink(colour: str) -> str:
    """Choose what can be read on a colour: black or white.

    >>> ink("#ffffff"), ink("#0072b2")
    ('#000000', '#ffffff')
    """
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
