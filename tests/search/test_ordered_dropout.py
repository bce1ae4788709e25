from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_db.errors import InvalidInput
from search_client.architecture import SearchLayer, SearchSpace
from search_client.ordered_dropout import balanced, draw, widths_of_layer

SPACE = SearchSpace(
    (
        SearchLayer("a", (0, 4, 8), (1,)),
        SearchLayer("b", (0, 2, 4, 6, 8), (3, 5, 7)),
        SearchLayer("c", (0, 4, 8), (3, 5)),
        SearchLayer("d", (1, 2, 3), (3,), tie="x"),
        SearchLayer("e", (1, 2, 3), (3,), tie="x"),
    )
)


@given(options=st.lists(st.integers(0, 99), min_size=1, max_size=12, unique=True), count=st.integers(1, 100))
def test_options_are_balanced_within_one(options: list[int], count: int) -> None:
    drawn = balanced(sorted(options), count, np.random.default_rng(count))
    times = [int((drawn == option).sum()) for option in options]
    assert sum(times) == count
    assert max(times) - min(times) <= 1


@settings(max_examples=50)
@given(batch=st.integers(1, 40), seed=st.integers(0, 5), step=st.integers(0, 1000))
def test_every_batch_is_balanced_and_repeatable(batch: int, seed: int, step: int) -> None:
    drawn = draw(SPACE, batch, seed=seed, step=step)
    again = draw(SPACE, batch, seed=seed, step=step)
    assert np.array_equal(drawn.widths, again.widths)
    assert np.array_equal(drawn.kernels, again.kernels)
    for number, layer in enumerate(SPACE.layers):
        for options, column in ((layer.widths, drawn.widths), (layer.kernels, drawn.kernels)):
            times = [int((column[:, number] == option).sum()) for option in options]
            assert sum(times) == batch
            assert max(times) - min(times) <= 1
    assert np.array_equal(drawn.widths[:, 3], drawn.widths[:, 4])  # tied


@given(batch=st.integers(2, 33), ranks=st.integers(1, 4))
def test_processes_share_one_global_batch(batch: int, ranks: int) -> None:
    whole = draw(SPACE, batch, seed=1, step=2)
    rebuilt = np.empty_like(whole.widths)
    for rank in range(ranks):
        rebuilt[rank::ranks] = draw(SPACE, batch, seed=1, step=2, rank=rank, ranks=ranks).widths
    assert np.array_equal(rebuilt, whole.widths)


def test_layers_and_steps_are_shuffled_independently() -> None:
    first, second = draw(SPACE, 30, seed=0, step=0), draw(SPACE, 30, seed=0, step=1)
    assert not np.array_equal(first.widths, second.widths)
    assert not np.array_equal(first.widths[:, 0], first.widths[:, 2])  # same options, other layer


@given(batch=st.integers(1, 40), opened=st.floats(0, 1), kept=st.floats(0, 0.99))
def test_a_grid_opens_from_the_full_width_and_some_images_keep_it(batch: int, opened: float, kept: float) -> None:
    options = (0, 2, 4, 6, 8)
    drawn = widths_of_layer(options, batch, np.random.default_rng(0), opened, kept)
    assert len(drawn) == batch
    allowed = options[-max(1, round(1 + opened * 4)) :]
    assert set(drawn.tolist()) <= set(allowed)
    assert int((drawn == 8).sum()) >= round(kept * batch)
    times = [int((drawn == option).sum()) for option in allowed]
    times[-1] -= round(kept * batch)
    assert max(times) - min(times) <= 1


def test_a_closed_grid_trains_the_full_network_only() -> None:
    drawn = draw(SPACE, 16, seed=0, step=0, opened=0.0)
    assert (drawn.widths == np.array(SPACE.full.widths)).all()


def test_one_kernel_for_the_batch_on_request() -> None:
    seen = set()
    for step in range(40):
        kernels = draw(SPACE, 8, seed=0, step=step, kernels="batch").kernels
        assert (kernels == kernels[0]).all()
        seen.add(int(kernels[0, 1]))
    assert seen == {3, 5, 7}


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(InvalidInput, match="rank"):
        draw(SPACE, 8, seed=0, step=0, rank=2, ranks=2)
