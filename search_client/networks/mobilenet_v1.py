"""MobileNetV1, the initial network of NetAdaptV2's ablation study (appendix D).

The paper does not give T for it; it is taken from FastDepth, whose encoder is MobileNetV1 (Table 10).
"""

from __future__ import annotations

from lut_db.errors import InvalidInput
from search_client.description import Conv, Description, Linear, Stage, round_to, separable

FILTERS_AND_STRIDES = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
STEM_FILTERS = 32
FIRST_LIMIT = 16
"""T at the output resolution of half the image; it doubles with every stride of 2."""


def describe(image_size: int = 224, classes: int = 1000, width: float = 1.0) -> Description:
    """MobileNetV1: a stem and 13 depthwise separable convolutions.

    network: {name: mobilenet_v1, image_size: 224, classes: 1000, width: 1.0}

    width: factor on all widths, which are rounded to multiples of 8.
    """
    if width <= 0:
        raise InvalidInput(f"{width} is no factor of widths", field="width", remedy="give a positive number")
    limit = FIRST_LIMIT
    stages: list[Stage] = [Conv("stem", round_to(STEM_FILTERS * width, 8), kernel=3, stride=2, limit=limit)]
    for number, (filters, stride) in enumerate(FILTERS_AND_STRIDES, start=1):
        if stride == 2:
            limit *= 2
        stages += separable(f"separable{number}", round_to(filters * width, 8), stride=stride, limit=limit)
    stages.append(Linear("classifier", classes))
    return Description("mobilenet_v1", (3, image_size, image_size), tuple(stages), width_count=9, divisor=1)
