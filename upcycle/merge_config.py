"""The settings of a merge: which method for which tensors, with which options and weights. No torch.

Names of methods and options are checked where torch may be imported: `merge.check_merge`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from upcycle.config import STRICT

Role = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
ROLES: tuple[str, ...] = get_args(Role)
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RoleConfig:
    """How the tensors of one role are merged. In settings a method's name alone will do."""

    method: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MergeConfig(RoleConfig):
    """How tensors of several models become one. In settings a method's name alone will do.

    method: one of merge.METHODS, or "seed", the seed's own tensor. options: of that method (docs/merging.md). weights: of
    models by name, relative; those that are not named have 1. roles: tensors of a role (roles.py) that go another way.
    """

    method: str = "average"
    weights: dict[str, Weight] = Field(default_factory=dict)
    roles: dict[Role, RoleConfig] = Field(default_factory=dict)

    def of(self, role: str) -> RoleConfig:
        """What holds for the tensors of a role."""
        return self.roles.get(role) or RoleConfig(method=self.method, options=self.options)  # pyright: ignore[reportArgumentType, reportCallIssue]

    @property
    def ways(self) -> list[RoleConfig]:
        """Every method in use, with its options."""
        return [self.of(role) for role in dict.fromkeys(["", *self.roles])]

    @property
    def record(self) -> str | dict[str, Any]:
        """As settings have it: the method's name alone where nothing else is set."""
        plain = {name: value for name, value in asdict(self).items() if value}
        return self.method if set(plain) == {"method"} else plain

    @property
    def words(self) -> str:
        """For people: "ties (density 0.3); norm: average; weights: code 2"."""
        parts = [
            _way(self.method, self.options),
            *(f"{role}: {_way(way.method, way.options)}" for role, way in self.roles.items()),
        ]
        if self.weights:
            parts.append("weights: " + ", ".join(f"{name} {weight:g}" for name, weight in self.weights.items()))
        return "; ".join(parts)


def _way(method: str, options: dict[str, Any]) -> str:
    said = ", ".join(f"{name} {value}" for name, value in options.items())
    return f"{method} ({said})" if said else method


def from_record(record: str | dict[str, Any]) -> MergeConfig:
    """What `MergeConfig.record` had written down."""
    return TypeAdapter(MergeConfig).validate_python(record)
