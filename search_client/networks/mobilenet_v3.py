"""The initial networks of NetAdaptV2 on ImageNet, based on MobileNetV3-Large (Sec. 4.1, appendix A.1).

Where appendix A.1 and Tables 8 and 9 disagree, the tables are followed: positions of squeeze-and-excite; block 13,
whose 256 squeezed channels imply an expansion of 1024; block 2, with an expansion in Table 8 and none in Table 9.
The width of a block that both tables removed is MobileNetV3's, rounded up to a power of two.
"""

from __future__ import annotations

from typing import Literal

from lut_db.errors import InvalidInput
from lut_db.operators import Activation
from search_client.description import Block, Conv, Description, Linear, round_to

# Rows 2 to 18 of Table 8: expansion, filters, kernel, stride, squeeze-and-excite.
BLOCKS: tuple[tuple[int, int, int, int, bool], ...] = (
    (16, 16, 5, 1, False),
    (64, 32, 5, 2, True), (128, 32, 5, 1, False),
    (128, 64, 7, 2, True), (128, 64, 7, 1, True), (128, 64, 7, 1, True), (128, 64, 7, 1, True),
    (256, 128, 5, 2, True), (256, 128, 5, 1, False), (256, 128, 5, 1, True), (256, 128, 5, 1, True),
    (1024, 128, 5, 1, True), (1024, 128, 5, 1, True), (1024, 128, 5, 1, True),
    (1024, 256, 7, 2, True), (1024, 256, 7, 1, True), (1024, 256, 7, 1, True),
)  # fmt: skip
STEM_FILTERS = 16
LAST_FILTERS = 1024
HEAD_FEATURES = 2048
HARD_SWISH_FROM = 7
"""The blocks from here on, and the stem, have hard-swish; the earlier ones ReLU."""
FIRST_LIMIT = 8
"""T at the output resolution of half the image; it doubles with every stride of 2."""
HEAD_LIMIT = 1024
EXPANSION_PER_SQUEEZE = 4


def describe(
    image_size: int = 224,
    classes: int = 1000,
    initial: Literal["latency", "macs"] = "latency",
    width: float | None = None,
    literal_residual_bypass: bool = False,
) -> Description:
    """MobileNetV3 as NetAdaptV2 starts from it.

    network: {name: mobilenet_v3, image_size: 224, classes: 1000, initial: latency}

    initial `latency`: 17 blocks, 9 widths per layer. `macs`: widths times 1.25, rounded to multiples of 8, one more
    block at the last resolution, 11 widths per layer. width: another factor than 1 or 1.25.
    """
    if initial not in ("latency", "macs"):
        raise InvalidInput(f"there is no initial network {initial!r}", field="initial", remedy="latency or macs")
    larger = initial == "macs"
    factor = width if width is not None else 1.25 if larger else 1.0
    if factor <= 0:
        raise InvalidInput(f"{factor} is no factor of widths", field="width", remedy="give a positive number")

    def scaled(channels: int) -> int:
        return channels if factor == 1 else round_to(channels * factor, 8)

    limit = FIRST_LIMIT
    stages: list[Conv | Block | Linear] = [
        Conv("stem", scaled(STEM_FILTERS), kernel=3, stride=2, limit=limit, activation="hard_swish")
    ]
    blocks = (*BLOCKS, BLOCKS[-1]) if larger else BLOCKS
    for number, (expand, filters, kernel, stride, squeezed) in enumerate(blocks):
        if stride == 2:
            limit *= 2
        activation: Activation = "hard_swish" if number >= HARD_SWISH_FROM else "relu"
        stages.append(
            Block(
                f"block{number + 2}",  # numbered as the rows of the paper's tables
                scaled(filters), None if larger and number == 0 else scaled(expand), kernel=kernel, stride=stride,
                limit=limit, activation=activation,
                squeeze=round_to(scaled(expand) / EXPANSION_PER_SQUEEZE, 8) if squeezed else 0,
            )
        )  # fmt: skip
    stages += [
        Conv("last", scaled(LAST_FILTERS), limit=limit, activation="hard_swish"),
        Linear("head", scaled(HEAD_FEATURES), activation="hard_swish", limit=HEAD_LIMIT),
        Linear("classifier", classes),
    ]
    return Description(
        name="mobilenet_v3", image=(3, image_size, image_size), stages=tuple(stages),
        width_count=11 if larger else 9, divisor=1 if factor == 1 else 8,
        literal_residual_bypass=literal_residual_bypass,
    )  # fmt: skip
