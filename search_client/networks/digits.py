"""A small MobileNetV3-style network for images of one channel, such as scikit-learn's digits."""

from __future__ import annotations

from lut_db.operators import Activation
from search_client.description import Block, Conv, Description, Linear, round_to

# Expansion, filters, kernel, stride, squeeze-and-excite, activation.
BLOCKS: tuple[tuple[int, int, int, int, bool, Activation], ...] = (
    (48, 24, 3, 1, False, "relu"),
    (96, 32, 5, 2, False, "relu"),
    (96, 32, 5, 1, True, "relu"),
    (96, 40, 3, 1, False, "hard_swish"),
    (160, 64, 5, 2, True, "hard_swish"),
    (192, 64, 5, 1, True, "hard_swish"),
    (192, 96, 3, 1, True, "hard_swish"),
)
STEM_FILTERS = 24
LAST_FILTERS = 192
FIRST_LIMIT = 16
"""T at the full resolution; it doubles with every stride of 2."""
EXPANSION_PER_SQUEEZE = 4
WIDTHS = 9


def describe(image_size: int = 32, classes: int = 10, literal_residual_bypass: bool = False) -> Description:
    """A stem, seven blocks with two strides of 2, a last convolution and a classifier; about 17 M MACs at 32 pixels.

    network: {name: digits, image_size: 32, classes: 10}
    """
    limit = FIRST_LIMIT
    stages: list[Conv | Block | Linear] = [Conv("stem", STEM_FILTERS, kernel=3, limit=limit, activation="hard_swish")]
    for number, (expand, filters, kernel, stride, squeezed, activation) in enumerate(BLOCKS, start=1):
        if stride == 2:
            limit *= 2
        squeeze = round_to(expand / EXPANSION_PER_SQUEEZE, 8) if squeezed else 0
        stages.append(Block(f"block{number}", filters, expand, kernel, stride, limit, activation, squeeze))
    stages += [
        Conv("last", LAST_FILTERS, limit=limit, activation="hard_swish"),
        Linear("classifier", classes),
    ]
    return Description(
        "digits", (1, image_size, image_size), tuple(stages), width_count=WIDTHS, divisor=8,
        literal_residual_bypass=literal_residual_bypass,
    )  # fmt: skip
