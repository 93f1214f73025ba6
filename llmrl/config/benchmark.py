"""What a benchmark's file says: where its problems are, how a model is asked, who judges, and how often it is sampled."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmrl.config.base import Recipe, Strict, as_list
from llmrl.config.data import Sources
from llmrl.config.reward import RewardSpec
from llmrl.config.templates import TEMPLATES


class PromptTemplate(Strict):
    """How a problem is put to the model: as the `user`'s turn of a conversation, or as plain `text` for a base model.

    `{question}` stands for the problem, `{choices}` for its lettered choices and `{tests}` for its tests, one a line. Nothing else in
    braces means anything, so LaTeX can be written as it is.
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


class AlsoScored(Strict):
    """A second number of the same completions: the mean of another scorer's values. A bare string is its `scorer`."""

    shorthand: ClassVar[str] = "scorer"

    scorer: RewardSpec = Field(description="a reward function")
    weight: str | None = Field(
        None, description="column by which problems count (IFEval: its number of instructions); default: all alike"
    )


def _named_templates(value: Any) -> Any:
    """A list names templates of `llmrl.config.templates`; a mapping defines them, or renames one by its name."""
    if isinstance(value, str):
        value = [value]
    named = (
        {name: name for name in value} if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
    )
    if not isinstance(named, dict):
        return value
    unknown = [v for v in named.values() if isinstance(v, str) and v not in TEMPLATES]
    if unknown:
        raise ValueError(
            f"no template is called {unknown[0]!r}; there are {', '.join(TEMPLATES)}, or write one: {{user: ...}}"
        )
    return {name: TEMPLATES[v] if isinstance(v, str) else v for name, v in named.items()}


class BenchmarkSpec(Recipe):
    """One benchmark. The file's name is the benchmark's; a user's own file has the same keys.

    `mode: choices` asks for the log-prob of each choice's text after the prompt instead of sampling. A local file under `data` is
    looked for beside the benchmark's file first.
    """

    kind: ClassVar[str] = "benchmark"

    title: str = Field(description="as papers call it")
    reference: str = Field("", description="paper and arXiv number")
    data: Sources = Field(description="hub id or file of the problems, or a list of them")
    copies: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="names under which `data_dir` may hold the problems, besides the benchmark's own"
    )
    convert: str = Field("problem", description="what reads a row of it: a name in llmrl.data.convert")
    problems: Annotated[list[int], BeforeValidator(lambda v: [v] if isinstance(v, int) else v)] = Field(
        [], description="how many there are, or the numbers that copies in use have; another one is an error"
    )
    mode: Literal["generate", "choices"] = Field(
        "generate", description="sample an answer, or compare log-probs of the choices"
    )
    prompts: Annotated[dict[str, PromptTemplate], BeforeValidator(_named_templates)] = Field(
        description="templates by name, or a list of names of those that come with llmrl; the first is the default"
    )
    scorer: RewardSpec = Field(
        RewardSpec(function="math_answer"), description="what judges a completion: a reward function"
    )
    threshold: float = Field(0.5, description="a completion is right when the scorer gives at least this")
    also: dict[str, AlsoScored] = Field({}, description="further numbers by name; accuracy is the `scorer`'s alone")
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
        if self.mode == "choices" and any(p.text is None for p in self.prompts.values()):
            raise ValueError("mode: choices continues a plain prompt: its templates have `text`, not `user`")
        return self


class BenchmarkRun(Strict):
    """A benchmark that a training run evaluates: a shipped one's name, or the path of a YAML file. A bare string is its `name`.

    What is not given here is as the benchmark says.
    """

    shorthand: ClassVar[str] = "name"

    name: str = Field(description="a benchmark that comes with llmrl, or a YAML file")
    template: str | None = Field(None, description="a name under the benchmark's `prompts`; default: its first")
    n: int | None = Field(None, ge=1, description="completions a problem")
    temperature: float | None = Field(None, ge=0, description="0 is greedy")
    max_completion_length: int | None = Field(None, ge=1, description="tokens sampled at most")
    max_problems: int | None = Field(None, ge=1, description="at most so many problems, the same ones every time")


class BenchmarkFields(Strict):
    """Benchmarks during training."""

    benchmarks: Annotated[list[BenchmarkRun], BeforeValidator(as_list)] = Field(
        [], description="evaluated whenever evaluation is due (eval_steps): a name, or a list (`benchmarks.0.n=4`)"
    )
    benchmark_dir: str | None = Field(None, description="local copies of the benchmarks' problems; default: the hub")
