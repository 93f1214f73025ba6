"""Where rows come from and how they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmrl.config.base import Strict


class DatasetSource(Strict):
    """One data set: a hub id, or a JSON, JSON Lines (also .gz) or Parquet file.

    `columns` renames: `{prompt: question}` reads the prompt from the column `question`.
    `prompt_template` builds the prompt from several columns: "{question}\\nAnswer:".
    `weight` is this source's share of the mixture (shares are normalised); None takes all of its rows once.
    """

    path: str
    name: str | None = Field(None, description="hub configuration")
    split: str = "train"
    columns: dict[str, str] = {}
    prompt_template: str | None = None
    completion_template: str | None = None
    weight: float | None = Field(None, gt=0)
    max_rows: int | None = Field(None, ge=1)


def _as_sources(value: Any) -> Any:
    if isinstance(value, str | dict | DatasetSource):
        value = [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


Sources = Annotated[list[DatasetSource], BeforeValidator(_as_sources)]


class DataFields(Strict):
    """The data part of a training recipe, flat at its top level."""

    dataset: Sources = []
    eval_dataset: Sources = []
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="share of the training rows held out for evaluation")
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    shuffle: bool = True
    on_overlong: Literal["drop", "truncate", "error"] = "drop"
