"""What `llmrl eval` runs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from llmrl.config.base import Recipe
from llmrl.config.benchmark import BenchmarkSpec
from llmrl.config.data import Sources
from llmrl.config.model import ModelFields
from llmrl.config.reward import RewardSpec
from llmrl.config.rollout import RolloutSettings
from llmrl.errors import ConfigError


def _names(value: Any) -> Any:
    """ "a,b" and ["a,b", "c"] as lists of names."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        return value
    return [name.strip() for item in listed for name in item.split(",") if name.strip()]


class EvalConfig(Recipe, ModelFields):
    """Accuracy of a model on benchmarks, or on a file of problems: a completion is right when the scorer gives at least `threshold`.

    What is null here is as the benchmark's file says; for `data`: one greedy completion of 512 tokens at most, judged by math_answer.
    """

    kind: ClassVar[str] = "eval"

    model_name_or_path: str = Field("", description="a hub id, or a directory in Hugging Face's format")
    benchmark: Annotated[list[str], BeforeValidator(_names)] = Field(
        [], description="benchmarks that come with llmrl, or paths of YAML files: math500,aime24"
    )
    data: Sources = Field(
        [],
        description="instead of a benchmark: problems, a path or a list of sources; beside one: where its problems are",
    )
    data_dir: str | None = Field(None, description="local copies of the benchmarks' problems; default: the hub")
    template: str | None = Field(None, description="a name under the benchmark's `prompts`; default: its first")
    predictions: str | None = Field(
        None, description="a file of completions to judge instead of sampling: {id, completion | completions} a line"
    )
    allow_missing: bool = Field(False, description="predictions: problems without one count as wrong")
    output: str | None = Field(
        None, description="a file (.json), or a directory that gets BENCHMARK.json; default: printed only"
    )
    overwrite: bool = Field(False, description="throw away what another evaluation left under `output`")
    n: int | None = Field(None, ge=1, description="completions a problem")
    seed: int = Field(0, description="of the sampling")
    temperature: float | None = Field(
        None, ge=0, description="0 is greedy, and takes n 1; n above 1 takes 1 where the benchmark is greedy"
    )
    top_p: float | None = Field(None, gt=0, le=1, description="nucleus; 1 turns it off")
    top_k: int = Field(0, ge=0, description="0 turns it off")
    min_p: float = Field(0.0, ge=0, lt=1, description="0 turns it off")
    max_completion_length: int | None = Field(None, ge=1, description="tokens sampled at most")
    max_prompt_length: int | None = Field(None, ge=1, description="tokens; of longer prompts the end is kept")
    scorer: RewardSpec | None = Field(None, description="what judges a completion: a reward function")
    allow_code_execution: bool = Field(
        False, description="let the scorer run programs that the model wrote, in a sandbox (docs/code.md)"
    )
    threshold: float | None = Field(None, description="a completion is right when the scorer gives at least this")
    system_prompt: str | None = Field(
        None, description="data: put before conversations that have none; makes a conversation of a plain prompt"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="handed to the chat template: `{enable_thinking: false}`"
    )
    batch_size: int = Field(512, ge=1, description="problems handed to the engine at once")
    rollout: RolloutSettings = Field(RolloutSettings(), description="the engine")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.benchmark and not self.data:
            raise ValueError(
                "give `benchmark` (--benchmark math500,aime24), or `data` (--data FILE) for problems of your own"
            )
        if self.data and (len(self.benchmark) > 1 or (self.benchmark and self.data_dir is not None)):
            raise ValueError(
                "`data` beside a benchmark is the file of its problems: give one benchmark with it, and no data_dir; several benchmarks find "
                "their files in a data_dir"
            )
        if len(set(self.benchmark)) < len(self.benchmark):
            raise ValueError(f"benchmark names one twice: {', '.join(self.benchmark)}")
        for key in ("data_dir", "template", "predictions"):
            if not self.benchmark and getattr(self, key) is not None:
                raise ValueError(
                    f"{key} is for benchmarks, and only `data` is given; name the benchmark too, or remove it"
                )
        if self.benchmark and self.system_prompt is not None:
            raise ValueError("system_prompt is for `data`; a benchmark's prompts are its templates (--template NAME)")
        if self.predictions is not None:
            if self.model_name_or_path:
                raise ValueError("predictions are completions that exist, judged without a model: leave --model out")
            if len(self.benchmark) != 1:
                raise ValueError("predictions are completions of one benchmark; judge one benchmark at a time")
            sampled = ("template", "n", "temperature", "top_p", "max_completion_length", "max_prompt_length")
            if useless := [key for key in sampled if getattr(self, key) is not None]:
                raise ValueError(
                    f"{', '.join(useless)} would change nothing: predictions are completions that exist, and nothing is sampled; leave it out"
                )
        elif not self.model_name_or_path:
            raise ValueError(
                "give the model (--model DIRECTORY_OR_HUB_ID), or completions to judge (--predictions FILE)"
            )
        elif self.allow_missing:
            raise ValueError("allow_missing is for predictions")
        if self.n is not None and self.n > 1 and self.temperature == 0:
            raise ValueError(_EQUAL.format(n=self.n))
        return self


_EQUAL = "temperature 0 gives n={n} equal completions of each problem, which say no more than one; use n=1, or a temperature above 0"


def resolved(spec: BenchmarkSpec, config: EvalConfig) -> BenchmarkSpec:
    """The benchmark's settings with what `config` changes of them. Raises ConfigError for several greedy completions.

    A greedy benchmark of which several completions are asked takes temperature 1; temperature 0 alone takes one completion.
    """
    keys = ("n", "temperature", "top_p", "max_completion_length", "scorer", "threshold")
    changed = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
    n = changed.get("n", spec.n)
    if n > 1 and changed.get("temperature") == 0:
        changed["n"] = 1
    elif n > 1 and changed.get("temperature", spec.temperature) == 0:
        changed["temperature"] = 1.0
    out = spec.model_copy(update=changed)
    if out.n > 1 and out.temperature == 0:
        raise ConfigError(_EQUAL.format(n=out.n))
    return out
