"""MCD and SCD over small spaces whose costs are plain functions: no model, no service, no clock."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lut_db.errors import InvalidInput
from search_client.architecture import Architecture, SearchLayer, SearchSpace
from search_client.optimizers import mcd
from search_client.optimizers.mcd import Config, State

GRID = tuple(range(0, 33, 4))


def make_space(layers: int = 6, kernels: tuple[int, ...] = (3, 5)) -> SearchSpace:
    return SearchSpace(tuple(SearchLayer(f"layer{n}", GRID, kernels) for n in range(layers)))


class Counted:
    """Costs like a chain of convolutions: a layer costs width x previous width x kernel^2; counts its calls."""

    def __init__(self, bump: float = 0.0, refuse: frozenset[int] = frozenset()) -> None:
        self.calls = 0
        self.asked: list[Architecture] = []
        self.bump = bump
        self.refuse = refuse

    def __call__(self, architectures: Sequence[Architecture]) -> list[float | None]:
        self.calls += 1
        self.asked += architectures
        return [self.one(architecture) for architecture in architectures]

    def one(self, architecture: Architecture) -> float | None:
        if self.refuse.intersection(architecture.widths):
            return None
        total, before = 50.0, 16
        for width, kernel in zip(architecture.widths, architecture.kernels, strict=True):
            total += before * width * kernel**2 / 100
            if 0 < width < before:
                total += self.bump  # a bypass appears: the step can raise the cost
            before = max(width, min(before, 16))
        return total


def quality(architectures: Sequence[Architecture]) -> list[float]:
    """Later layers matter more; large kernels matter a little."""
    return [
        sum((n + 1) * math.sqrt(w) for n, w in enumerate(one.widths)) + sum(one.kernels) / 10 for one in architectures
    ]


def run(config: Config, space: SearchSpace, cost: Counted, canonical: mcd.Canonical | None = None) -> State:
    state = mcd.start(config, space, cost, quality, canonical)
    for following in mcd.search(state, config, space, cost, quality, canonical):
        state = following
    return state


configs = st.builds(
    Config,
    samples=st.integers(1, 12),
    layers=st.integers(2, 5),
    reduction=st.floats(0.03, 0.2),
    decay=st.sampled_from([0.97, 0.98, 1.0]),
    budget_ratio=st.floats(0.45, 0.95),
    relative=st.booleans(),
    seed=st.integers(0, 1000),
    look_ahead=st.integers(1, 6),
)


@settings(max_examples=60, deadline=None)
@given(config=configs, bump=st.sampled_from([0.0, 3.0, 15.0]))
def test_every_step_meets_its_target_and_targets_fall_to_the_budget(config: Config, bump: float) -> None:
    cost = Counted(bump)
    state = run(config, make_space(), cost)
    initial = state.trajectory[0]
    assert initial.architecture == make_space().full
    assert state.finished
    assert state.trajectory[-1].cost <= state.budget == pytest.approx(config.budget_ratio * initial.cost)
    for before, entry in pairwise(state.trajectory):
        assert entry.iteration == before.iteration + 1
        assert state.budget <= entry.target < before.target
        assert entry.cost <= entry.target
        assert entry.cost == cost.one(entry.architecture)
        for candidate in entry.candidates:
            assert candidate.cost <= entry.target
        if entry.candidates:
            best = entry.candidates[0]
            assert (best.key, best.cost, best.quality) == (entry.architecture.key, entry.cost, entry.quality)
            assert best.quality == max(candidate.quality for candidate in entry.candidates)
            assert entry.drawn <= config.samples


@settings(max_examples=40, deadline=None)
@given(config=configs, stop=st.integers(0, 5), other_look_ahead=st.integers(1, 9))
def test_resumed_from_json_equals_uninterrupted(config: Config, stop: int, other_look_ahead: int) -> None:
    space = make_space()
    whole = run(config, space, Counted(3.0))
    again = run(config, space, Counted(3.0))
    assert again == whole

    state = mcd.start(config, space, Counted(3.0), quality)
    for _ in range(stop):
        state = mcd.step(state, config, space, Counted(3.0), quality)
    state = State.from_json(json.dumps(json.loads(state.to_json())))
    # How far ahead steps are costed changes the number of requests, never a result.
    config = replace(config, look_ahead=other_look_ahead)
    for following in mcd.search(state, config, space, Counted(3.0), quality):
        state = following
    assert state == whole
    assert state.to_json() == whole.to_json()


def test_targets_are_those_of_the_paper() -> None:
    config = Config(samples=1, layers=1, reduction=0.03, decay=0.98, budget_ratio=0.9)
    assert mcd.schedule(config, 200.0) == pytest.approx([194.0, 194 - 6 * 0.98, 194 - 6 * 0.98 - 6 * 0.98**2, 180.0])
    relative = mcd.schedule(replace(config, relative=True), 200.0)
    assert relative[:2] == pytest.approx([194.0, 194.0 * (1 - 0.03 * 0.98)])
    assert relative[-1] == 180.0
    assert mcd.schedule(replace(config, budget_ratio=1.0), 200.0) == []


def test_the_previous_target_counts_not_the_cost_that_was_reached() -> None:
    """With coarse steps samples land far below their target; the next iteration then keeps the architecture."""
    space = SearchSpace(tuple(SearchLayer(f"layer{n}", (0, 32), (3,)) for n in range(6)))
    config = Config(samples=6, layers=1, reduction=0.02, budget_ratio=0.6)
    state = run(config, space, Counted())
    kept = [entry for entry in state.trajectory[1:] if not entry.candidates]
    assert kept
    assert [entry.target for entry in state.trajectory[1:]] == mcd.schedule(config, state.initial_cost)[
        : state.iteration
    ]


@pytest.mark.parametrize("relative", [False, True])
@settings(max_examples=40, deadline=None)
@given(reduction=st.floats(0.005, 0.3), decay=st.floats(0.5, 0.99), ratio=st.floats(0.02, 0.99))
def test_a_budget_out_of_reach_is_refused_before_the_search(
    relative: bool, reduction: float, decay: float, ratio: float
) -> None:
    config = Config(samples=1, layers=1, reduction=reduction, decay=decay, budget_ratio=ratio, relative=relative)
    least = math.prod(1 - reduction * decay**t for t in range(5000)) if relative else 1 - reduction / (1 - decay)
    if ratio > least + 1e-4:
        assert mcd.schedule(config, 10.0)[-1] == pytest.approx(10.0 * ratio)
    elif ratio < least - 1e-4:
        cost = Counted()
        with pytest.raises(InvalidInput, match=r"reduction: .*at most") as refused:
            mcd.start(config, make_space(), cost, quality)
        assert refused.value.field == "reduction"
        assert refused.value.remedy
        assert len(cost.asked) == 1
        advised = refused.value.remedy.split()[3]
        if advised != "the" and float(advised) < 1:
            assert mcd.schedule(replace(config, reduction=float(advised)), 10.0)


def test_an_iteration_is_a_handful_of_calls() -> None:
    space = make_space(layers=20, kernels=(3, 5, 7))
    config = Config(samples=80, layers=10, reduction=0.03, budget_ratio=0.5)
    cost = Counted(1.0)
    state = mcd.start(config, space, cost, quality)
    cost.calls = 0
    for _ in range(5):
        state = mcd.step(state, config, space, cost, quality)
    assert cost.calls <= 5 * 15


def test_unneeded_steps_are_taken_back() -> None:
    """A sample keeps no single step that the target does not ask for, where steps only ever lower the cost."""
    space = make_space()
    config = Config(samples=8, layers=4, reduction=0.15, budget_ratio=0.6, seed=3)
    cost = Counted()
    state = mcd.start(config, space, cost, quality)
    following = mcd.step(state, config, space, cost, quality)
    base, chosen, target = state.architecture, following.architecture, following.trajectory[-1].target
    for layer, (full, width) in enumerate(zip(base.widths, chosen.widths, strict=True)):
        if width < full:
            larger = chosen.with_width(layer, GRID[GRID.index(width) + 1])
            assert (cost.one(larger) or 0) > target
    for layer, (full, kernel) in enumerate(zip(base.kernels, chosen.kernels, strict=True)):
        if kernel < full and chosen.widths[layer] > 0:
            assert (cost.one(chosen.with_kernel(layer, full)) or 0) > target


def test_each_sample_shrinks_at_most_l_layers() -> None:
    space = make_space(layers=10)
    for layers in (1, 3):
        config = Config(samples=10, layers=layers, reduction=0.05, budget_ratio=0.8)
        state = mcd.start(config, space, Counted(), quality)
        following = mcd.step(state, config, space, Counted(), quality)
        changed = [
            pair
            for pair in zip(
                zip(state.architecture.widths, state.architecture.kernels, strict=True),
                zip(following.architecture.widths, following.architecture.kernels, strict=True),
                strict=True,
            )
            if pair[0] != pair[1]
        ]
        assert 1 <= len(changed) <= layers


def test_scd_shrinks_layer_k_in_sample_k() -> None:
    space = make_space()
    config = mcd.scd(Config(samples=99, layers=4, reduction=0.04, budget_ratio=0.7), space)
    assert (config.samples, config.layers) == (6, 1)
    state = mcd.start(config, space, Counted(), quality)
    changed = set()
    first = mcd.step(state, config, space, Counted(), quality)
    assert first.trajectory[-1].drawn == 6
    for entry_before, entry in pairwise(run(config, space, Counted()).trajectory):
        before = zip(entry_before.architecture.widths, entry_before.architecture.kernels, strict=True)
        after = zip(entry.architecture.widths, entry.architecture.kernels, strict=True)
        layers = [n for n, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        assert len(layers) <= 1
        changed.update(layers)
    assert len(changed) > 1


def test_finds_the_known_optimum() -> None:
    """Two layers of equal cost, of which only the second matters: all that can be shrunk is taken from the first."""
    space = SearchSpace((SearchLayer("free", GRID, (3,)), SearchLayer("dear", GRID, (3,))))

    def cost(architectures: Sequence[Architecture]) -> list[float | None]:
        return [float(sum(one.widths)) for one in architectures]

    def dear(architectures: Sequence[Architecture]) -> list[float]:
        return [float(one.widths[1]) for one in architectures]

    config = Config(samples=8, layers=1, reduction=0.0625, decay=1.0, budget_ratio=0.5)
    state = mcd.start(config, space, cost, dear)
    for following in mcd.search(state, config, space, cost, dear):
        state = following
    assert state.architecture.widths == (0, 32)


def test_ties_go_to_the_lower_cost_then_to_the_hash() -> None:
    config = Config(samples=12, layers=2, reduction=0.1, budget_ratio=0.8)
    space = make_space()

    def flat(architectures: Sequence[Architecture]) -> list[float]:
        return [1.0] * len(architectures)

    state = mcd.start(config, space, Counted(), flat)
    entry = mcd.step(state, config, space, Counted(), flat).trajectory[-1]
    assert list(entry.candidates) == sorted(entry.candidates, key=lambda one: (one.cost, one.key))
    assert entry.cost == min(candidate.cost for candidate in entry.candidates)


def test_equal_networks_are_judged_once() -> None:
    """`canonical` folds kernels away here: samples that differ in kernels only are one network."""
    space = make_space()

    def canonical(architecture: Architecture) -> Architecture:
        return replace(architecture, kernels=tuple(3 for _ in architecture.kernels))

    cost = Counted()
    state = run(Config(samples=12, layers=3, reduction=0.1, budget_ratio=0.5), space, cost, canonical)
    assert all(set(entry.architecture.kernels) == {3} for entry in state.trajectory)
    assert all(set(one.kernels) == {3} for one in cost.asked)
    for entry in state.trajectory:
        assert len({candidate.key for candidate in entry.candidates}) == len(entry.candidates)


def test_architectures_that_cannot_be_costed_are_no_candidates() -> None:
    cost = Counted(refuse=frozenset({24}))
    state = run(Config(samples=16, layers=3, reduction=0.12, budget_ratio=0.6), make_space(), cost)
    assert state.finished
    assert all(24 not in entry.architecture.widths for entry in state.trajectory)


def test_no_valid_sample_is_an_error_that_says_what_to_do() -> None:
    config = Config(samples=4, layers=1, reduction=0.5, decay=1.0, budget_ratio=0.3)
    state = mcd.start(config, make_space(layers=12), Counted(), quality)
    with pytest.raises(mcd.NoValidSample, match="more layers"):
        mcd.step(state, config, make_space(layers=12), Counted(), quality)


def test_an_initial_network_without_cost_is_refused() -> None:
    config = Config(samples=4, layers=1, reduction=0.5, budget_ratio=0.3)
    with pytest.raises(mcd.NoValidSample, match="initial network"):
        mcd.start(config, make_space(), Counted(refuse=frozenset({32})), quality)


def test_a_quality_that_is_no_number_is_refused() -> None:
    config = Config(samples=4, layers=1, reduction=0.5, budget_ratio=0.6)
    with pytest.raises(InvalidInput, match="quality"):
        mcd.start(config, make_space(), Counted(), lambda architectures: [math.nan for _ in architectures])


def test_a_budget_already_met_ends_at_once() -> None:
    config = Config(samples=4, layers=1, reduction=0.1, budget=1e9)
    state = mcd.start(config, make_space(), Counted(), quality)
    assert state.finished
    assert list(mcd.search(state, config, make_space(), Counted(), quality)) == []


def test_tied_layers_shrink_together() -> None:
    layers = make_space().layers
    space = SearchSpace(tuple(replace(layer, tie="pair") if n in (1, 3) else layer for n, layer in enumerate(layers)))
    state = run(Config(samples=10, layers=2, reduction=0.08, budget_ratio=0.5), space, Counted())
    assert all(entry.architecture.widths[1] == entry.architecture.widths[3] for entry in state.trajectory)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("samples", {"samples": 0}),
        ("layers", {"layers": 0}),
        ("reduction", {"reduction": 3.0}),
        ("decay", {"decay": 0.0}),
        ("budget_ratio", {"budget_ratio": 1.5}),
        ("budget", {"budget": 4.0}),
        ("budget", {"budget_ratio": None}),
        ("look_ahead", {"look_ahead": 0}),
    ],
)
def test_a_bad_configuration_names_its_field(field: str, values: dict[str, float]) -> None:
    good = {"samples": 4, "layers": 2, "reduction": 0.03, "budget_ratio": 0.5}
    with pytest.raises(InvalidInput) as refused:
        Config(**(good | values))  # type: ignore[arg-type]
    assert refused.value.field == field


def test_more_layers_than_the_network_has_are_refused() -> None:
    config = Config(samples=4, layers=7, reduction=0.1, budget_ratio=0.6)
    with pytest.raises(InvalidInput, match="layers"):
        mcd.start(config, make_space(), Counted(), quality)
