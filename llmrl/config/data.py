"""Where rows come from and how they are read."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llmrl.config.base import Strict, as_list


class DatasetSource(Strict):
    """One data set: a hub id, or a JSON, JSON Lines (also .gz) or Parquet file. A bare string is its `path`.

    `columns` renames: `{prompt: question}` reads the prompt from the column `question`.
    `prompt_template` builds the prompt from several columns: "{question}\\nAnswer:".
    `weight` is this source's share of the mixture (shares are normalised); None takes all of its rows once.
    """

    shorthand: ClassVar[str] = "path"

    path: str = Field(description="a hub id, or a .json, .jsonl, .jsonl.gz or .parquet file")
    name: str | None = Field(None, description="hub configuration")
    split: str = Field("train", description="hub split")
    columns: dict[str, str] = Field(
        {}, description="renames, ours: theirs; `{prompt: question}` reads the prompt from `question`"
    )
    prompt_template: str | None = Field(None, description='builds the prompt from columns: "{question}\\nAnswer:"')
    completion_template: str | None = Field(None, description="builds the completion from columns")
    weight: float | None = Field(
        None, gt=0, description="share of the mixture, normalised; default: all of its rows once"
    )
    max_rows: int | None = Field(None, ge=1, description="at most so many rows, chosen by the seed")


Sources = Annotated[list[DatasetSource], BeforeValidator(as_list)]


class DataFields(Strict):
    """Data."""

    dataset: Sources = Field([], description="training data: a path, or a list of sources (`dataset.0.split=test`)")
    eval_dataset: Sources = Field([], description="evaluation data, as `dataset`")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="share of the training rows held out for evaluation")
    system_prompt: str | None = Field(
        None, description="put before conversations that have none; makes a conversation of a plain prompt"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="handed to the chat template: `{enable_thinking: false}`"
    )
    shuffle: bool = Field(True, description="draw rows in a new order every epoch")
    on_overlong: Literal["drop", "truncate", "error"] = Field(
        "drop", description="rows or prompts beyond the length limit"
    )
