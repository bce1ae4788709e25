"""Recipes: the one that is shipped is valid, and what is wrong in one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lut_db.errors import InvalidInput
from lut_db.plans import IN_CONTEXT, WHOLE
from search_client import networks, recipe
from search_client.recipe import Recipe, load, parse

RECIPES = sorted((Path(recipe.__file__).parents[1] / "recipes").glob("*.yaml"))

BASE: dict[str, Any] = {
    "name": "trial",
    "network": {"name": "digits"},
    "data": {"name": "digits"},
    "search": {"budget_ratio": 0.5, "reduction": 0.05},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    loaded = load(path)
    assert loaded.name == path.stem
    assert loaded.optimizer.layers <= len(networks.load(loaded.network.name, **loaded.network.options).space.layers)


def test_what_is_left_out_has_a_default() -> None:
    parsed = parse(BASE)
    assert parsed.search.metric == "latency"
    assert parsed.search.decay == 0.98
    assert parsed.latency.plan == IN_CONTEXT
    assert parsed.latency.whole == WHOLE
    assert parsed.train_initial
    assert Recipe.model_validate(parsed.model_dump(mode="json")) == parsed


def test_plans_are_overridden_field_by_field() -> None:
    parsed = parse(BASE | {"latency": {"plan": {"carriers": 5}, "whole": {"min_runs": 20}}})
    assert parsed.latency.plan == IN_CONTEXT.model_copy(update={"carriers": 5})
    assert parsed.latency.whole == WHOLE.model_copy(update={"min_runs": 20})


def test_scd_has_one_sample_for_each_layer() -> None:
    parsed = parse(BASE | {"search": {"budget_ratio": 0.5, "reduction": 0.05, "optimizer": "scd"}})
    assert (parsed.optimizer.samples, parsed.optimizer.layers, parsed.optimizer.each_layer) == (23, 1, True)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"serch": {}}, "serch", "did you mean 'search'"),
        ({"search": {"budget_ratio": 0.5, "sample": 3}}, "search.sample", "did you mean 'samples'"),
        ({"search": {"budget_ratio": 0.5, "metric": "latancy"}}, "search.metric", "latency, macs, parameters"),
        ({"search": {}}, "search.budget", "exactly one"),
        ({"search": {"budget_ratio": 0.2, "reduction": 0.01}}, "search.reduction", "raise it to 0.017"),
        ({"search": {"budget_ratio": 0.5, "samples": 0}}, "search.samples", "below 1"),
        ({"super_network": {"epoch": 1}}, "super_network", "did you mean 'epochs'"),
        ({"super_network": {"epochs": 0}}, "super_network.epochs", "1 or more"),
        ({"discovered_network": {"optimizer": "lion"}}, "discovered_network.optimizer", "sgd"),
        ({"latency": {"plan": {"carrier": 2}}}, "latency.plan.carrier", "did you mean 'carriers'"),
        ({"latency": {"plan": {"context": "whole"}}}, "latency", "in_context"),
        ({"latency": {"whole": {"context": "isolated"}}}, "latency", "whole"),
        ({"latency": {"target": {"runtme": "x"}}}, "latency", "did you mean 'runtime'"),
        ({"network": {"name": "digit"}}, "network", "digits"),
        ({"network": {"name": "digits", "imagesize": 3}}, "network", "image_size"),
        ({"network": {"name": "digits", "image_size": "large"}}, None, ""),
        ({"data": {"name": "cifar"}}, "data", "digits"),
        ({"calibration": {"networks": 3}}, "calibration", "5 networks"),
        ({"name": "../up"}, "name", "pattern"),
        ({"seed": -1}, "seed", "greater"),
        ({"threads": 0}, "threads", "greater"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], field: str | None, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(BASE | change, "trial.yaml")
    if field is not None:
        assert caught.value.field == field
    assert "trial.yaml" in str(caught.value)
    assert words in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        load(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(InvalidInput, match="no YAML"):
        load(broken)
    broken.write_text("just words")
    with pytest.raises(InvalidInput, match=r"digits\.yaml"):
        load(broken)
