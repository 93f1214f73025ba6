"""What a benchmark's file says: where its problems are, how a model is asked, who judges, and how often it is sampled."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmrl.config.base import Recipe, Strict, as_list
from llmrl.config.data import DatasetSource
from llmrl.config.reward import RewardSpec


class PromptTemplate(Strict):
    """How a problem is put to the model: as the `user`'s turn of a conversation, or as plain `text` for a base model.

    `{question}` stands for the problem, `{choices}` for its lettered choices, one a line. Nothing else in braces means anything, so
    LaTeX can be written as it is.
    """

    system: str | None = Field(None, description="the system's turn; default: none")
    user: str | None = Field(None, description="the user's turn")
    text: str | None = Field(
        None, description="instead of a conversation: a plain prompt, not put through a chat template"
    )
    cut: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="a completion is read up to the first of these, where a base model goes on to the next problem"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.user is None) == (self.text is None) or (self.text is not None and self.system is not None):
            raise ValueError("give `user` (and, if wanted, `system`) for a conversation, or `text` for a plain prompt")
        if "{question}" not in (self.user or self.text or ""):
            raise ValueError("the template has no {question}, so every problem would be asked alike")
        return self


class BenchmarkSpec(Recipe):
    """One benchmark. The file's name is the benchmark's; a user's own file has the same keys.

    `mode: choices` asks for the log-prob of each choice's text after the prompt instead of sampling.
    """

    kind: ClassVar[str] = "benchmark"

    title: str = Field(description="as papers call it")
    reference: str = Field("", description="paper and arXiv number")
    data: DatasetSource = Field(description="hub id or file of the problems")
    convert: str = Field("problem", description="what reads a row of it: a name in llmrl.data.convert")
    problems: int | None = Field(None, ge=1, description="how many there are; another number is an error")
    mode: Literal["generate", "choices"] = Field(
        "generate", description="sample an answer, or compare log-probs of the choices"
    )
    prompts: dict[str, PromptTemplate] = Field(description="templates by name; the first is the default")
    scorer: RewardSpec = Field(
        RewardSpec(function="math_answer"), description="what judges a completion: a reward function"
    )
    threshold: float = Field(0.5, description="a completion is right when the scorer gives at least this")
    metric: Literal["accuracy", "acc_norm"] = Field(
        "accuracy",
        description="of `mode: choices`: by log-prob, or by log-prob over the length of the choice in characters",
    )
    n: int = Field(1, ge=1, description="completions a problem")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: int = Field(4096, ge=1, description="tokens sampled at most")
    breakdown: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="columns by whose values accuracy is listed too, such as subject and level"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.prompts:
            raise ValueError("a benchmark needs at least one template under `prompts`")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"temperature 0 gives n={self.n} equal completions of each problem; use n: 1, or a temperature above 0"
            )
        return self
