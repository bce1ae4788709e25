"""Recipes: what a search is made of, as a YAML file. Unknown fields are refused with the nearest name that exists.

name: digits
seed: 0
network: {name: digits, image_size: 32}      # a module of search_client.networks, and its options
data: {name: digits, image_size: 32}         # a module of search_client.data, and its options
super_network: {epochs: 20, batch_size: 64}  # search_client.training.TrainingOptions
search: {metric: latency, budget_ratio: 0.5, samples: 40, layers: 4, reduction: 0.06, decay: 0.98}
discovered_network: {epochs: 20}             # TrainingOptions again
calibration: {networks: 14}
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lut_db.errors import InvalidInput
from lut_db.plans import IN_CONTEXT, WHOLE, Plan
from lut_db.targets import Name, Target
from search_client import data, metrics, networks
from search_client.optimizers import mcd
from search_client.training import TrainingOptions


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlugIn(BaseModel):
    """A plug-in by its name, and its options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _only_known(given: Any) -> Any:
    """pydantic leaves unknown names of a dataclass unmentioned; a recipe must not."""
    if isinstance(given, dict):
        known = [field.name for field in fields(TrainingOptions)]
        for name in given:
            if name not in known:
                raise ValueError(f"there is no option {name!r}{_nearest(str(name), known)}")
    return given


def _whole(given: Any) -> Any:
    """Overrides of the plan for whole networks."""
    return {**WHOLE.model_dump(), **given} if isinstance(given, dict) else given


Training = Annotated[TrainingOptions, BeforeValidator(_only_known)]


class Search(Section):
    """How the optimizer goes: see `search_client.optimizers.mcd.Config`.

    `recalibration_images`: how many training images a sample's batch-norm statistics are taken anew on before it is
    judged; 0 judges it with the super-network's.
    """

    optimizer: Literal["mcd", "scd"] = "mcd"
    metric: str = "latency"
    budget_ratio: float | None = None
    budget: float | None = None
    samples: int = 40
    layers: int = 4
    reduction: float = 0.05
    decay: float = 0.98
    relative: bool = False
    redraws: int = 10
    look_ahead: int = 4
    recalibration_images: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Search:
        metrics.load(self.metric)
        config = self.config(seed=0)
        if config.budget_ratio is not None:
            mcd.schedule(config, 1.0)  # before anything is trained
        return self

    def config(self, seed: int) -> mcd.Config:
        return mcd.Config(
            **self.model_dump(exclude={"optimizer", "metric", "recalibration_images"}), seed=seed
        )  # fmt: skip


class Calibration(Section):
    """Where a table has no correction yet, one is fitted on this many random sub-networks; 0 fits none."""

    networks: int = Field(default=14, ge=0, le=256)

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        if 0 < self.networks < 5:
            raise ValueError("a correction is fitted on 5 networks or more; 0 does without")
        return self


class Latency(Section):
    """How latencies are measured, and on what: `target` gives the fields that the target must have.

    `plan` and `whole` override single fields of the usual plans for operators and for whole networks.
    """

    plan: Plan = IN_CONTEXT
    whole: Annotated[Plan, BeforeValidator(_whole)] = WHOLE
    target: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Latency:
        if self.whole.context != "whole":
            raise ValueError("whole: its context must be 'whole'")
        if self.plan.context == "whole":
            raise ValueError("plan: its context must be 'in_context' or 'isolated'")
        for name in self.target:
            if name not in Target.model_fields:
                raise ValueError(f"target: a target has no field {name!r}{_nearest(name, list(Target.model_fields))}")
        return self


class Recipe(Section):
    """A whole search."""

    name: Name
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1, description="threads of torch; all cores without it")
    network: PlugIn
    data: PlugIn
    super_network: Training = TrainingOptions()
    search: Search
    discovered_network: Training = TrainingOptions()
    train_initial: bool = Field(
        default=True,
        description="also train the initial network alike, to compare with; else the super-network at full width",
    )
    calibration: Calibration = Calibration()
    latency: Latency = Latency()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        try:
            networks.load(self.network.name, **self.network.options)
        except TypeError as error:
            raise ValueError(f"network: {error}") from error

        if self.data.name not in data.names():
            raise InvalidInput(
                f"there is no data set {self.data.name!r}", field="data", remedy=f"one of {', '.join(data.names())}"
            )
        return self

    @property
    def optimizer(self) -> mcd.Config:
        config = self.search.config(self.seed)
        if self.search.optimizer == "scd":
            return mcd.scd(config, networks.load(self.network.name, **self.network.options).space)
        return config


def load(path: Path) -> Recipe:
    """Reads a recipe. Raises InvalidInput that names the file and the field and says what to do."""
    try:
        text = path.read_text()
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}", field="recipe", remedy="give the path of a recipe") from error
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path} is no YAML: {error}", field="recipe") from error
    return parse(given, str(path))


def parse(given: Any, source: str = "recipe") -> Recipe:
    """A recipe from plain data. Raises InvalidInput for the first thing that is wrong."""
    if not isinstance(given, dict):
        raise InvalidInput(f"{source} holds no fields", field="recipe", remedy="start from recipes/digits.yaml")
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        raise _explained(error, source) from error


def _explained(error: ValidationError, source: str) -> InvalidInput:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidInput):
        inner = cause.field or ""
        # A check of a whole section names its field itself.
        field = inner if not where or inner.startswith(where) else f"{where}.{inner}" if inner else where
        return InvalidInput(f"{source}: {cause.message}", field=field or None, remedy=cause.remedy)
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        names = _names(first["loc"][:-1])
        message = f"there is no such field{_nearest(str(first['loc'][-1]), names)}"
    return InvalidInput(f"{source}: {message}", field=where or None)


def _names(path: Sequence[int | str]) -> list[str]:
    """The names that a section of a recipe may hold."""
    model: Any = Recipe
    for part in path:
        model = model.model_fields[str(part)].annotation
    return list(model.model_fields)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else f": there are {', '.join(known)}"
