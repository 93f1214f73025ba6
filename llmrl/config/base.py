"""The strict models that every part of a recipe derives from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llmrl.errors import ConfigError


class RecipeError(ConfigError):
    """Everything that is wrong with one recipe, at once.

    `problems` are (dotted key, what is wrong) pairs; the key is "" for a rule about several keys.
    """

    def __init__(self, problems: list[tuple[str, str]], where: str = "recipe") -> None:
        self.problems = problems
        lines = [f"{key}: {text}" if key else text for key, text in problems]
        if len(lines) == 1:
            super().__init__(f"{where}: {lines[0]}")
        else:
            super().__init__("\n  ".join([f"{where}: {len(lines)} problems", *lines]))


class Strict(BaseModel):
    """Unknown keys are errors, types are not guessed, defaults are validated, values do not change after the recipe was read.

    A class with a `shorthand` may be given as a bare string, which is then the value of that key.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )
    shorthand: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, data: Any) -> Any:
        return {cls.shorthand: data} if cls.shorthand and isinstance(data, str) else data


class Recipe(Strict):
    """A whole recipe. What pydantic finds wrong with it is raised as one `RecipeError`, from Python and from YAML alike."""

    kind: ClassVar[str]

    if not TYPE_CHECKING:  # type checkers and editors keep the signature that is made from the fields

        def __init__(self, /, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                from llmrl.config.explain import explain

                raise RecipeError(explain(type(self), error, data), f"{self.kind} recipe") from None


def as_list(value: Any) -> Any:
    """One item, given as a string, a mapping or a model, is a list of one."""
    return [value] if isinstance(value, str | dict | BaseModel) else value
