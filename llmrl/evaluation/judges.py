"""Judges in this process: an engine answers the grading prompts, without a server.

torch and transformers are imported when a judge is made: where every judge has a server, neither is needed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any, ClassVar

from llmrl.config.model import ModelFields
from llmrl.config.rubric import JudgeSettings
from llmrl.data.schemas import PromptRow
from llmrl.errors import ConfigError, DataError
from llmrl.rewards.base import describe_error
from llmrl.rewards.judge_budget import JudgeError, MeteredJudge
from llmrl.train.launch import local_device
from llmrl.types import Completion, Messages, Prompt, RolloutEngine, Sampling

_GATHER = 0.05
"""Seconds without a new question after which those that wait are answered together."""
_BATCH_TOKENS = 65_536


class EngineJudge(MeteredJudge):
    """A `Judge` (llmrl.types) that samples its replies from a `RolloutEngine`. Questions that come together are answered together.

    engine: any that one process may ask alone, and whose model is not trained. tokenizer: of its model, with a chat template. max_length:
    prompt and reply in tokens; a question that leaves no room for `settings.max_tokens` fails alone. lock: held while the engine
    samples, for judges that share one.

    Replies are not held to the schema: there is only what the prompt says of it. Special tokens in what a judge is shown are broken up
    with a space, so that no answer can close its turn. Raises ConfigError for a tokenizer without a chat template.

    Example:
        settings = JudgeSettings(model="my-judge")
        judge = EngineJudge(engine, tokenizer, settings)
        reward = JudgedReward(RewardSpec(rubric="helpful", judge=settings), "helpful", judge)
        GRPOTrainer(config, reward_funcs=[(reward, 0.5)])
    """

    together: ClassVar[bool] = True

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Any,
        settings: JudgeSettings,
        *,
        stop_ids: Iterable[int] = (),
        max_length: int | None = None,
        lock: threading.Lock | None = None,
    ) -> None:
        from llmrl.data.chat import ChatRenderer

        super().__init__(settings)
        self._engine, self._max_length, self._engine_lock = engine, max_length, lock or threading.Lock()
        self._specials = [
            t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 1
        ]
        try:
            self._renderer = ChatRenderer(tokenizer, stop_ids=stop_ids)
            self._has_system = self._takes_system()
        except DataError as error:
            raise ConfigError(f"judge.model {settings.model}: {error}. Give an instruct model") from error
        self._numbers = count()
        self._lock, self._working = threading.Lock(), False
        self._waiting: list[tuple[Prompt, Future[Completion]]] = []

    async def ask(self, messages: Messages, schema: Mapping[str, Any]) -> str:
        """The reply. Raises JudgeError, BudgetSpent when there is no budget for another request."""
        prompt = self._prompt(messages)
        self._pay()
        began, answer = time.monotonic(), Future[Completion]()
        with self._lock:
            self._waiting.append((prompt, answer))
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="llmrl-judge", daemon=True).start()
        completion = await asyncio.wrap_future(answer)
        self._count(len(prompt.ids), len(completion.ids), time.monotonic() - began)
        return completion.text

    def _prompt(self, messages: Messages) -> Prompt:
        """Raises JudgeError for what can't be put before the model."""
        try:
            ids = self._ids([{**m, "content": self._harmless(m["content"])} for m in messages])
        except DataError as error:
            raise JudgeError(f"the question can't be rendered: {error}", row_caused=True) from error
        most = self.settings.max_tokens
        if self._max_length is not None and len(ids) + most > self._max_length:
            raise JudgeError(
                f"the question has {len(ids)} tokens, which with judge.max_tokens {most} is more than the {self._max_length} of the judge's "
                "model; lower judge.max_tokens or judge.max_answer_characters",
                row_caused=True,
            )
        return Prompt(f"judge-{next(self._numbers)}", tuple(ids), "")

    def _ids(self, messages: Messages) -> list[int]:
        if not self._has_system:
            system, first, *others = messages
            messages = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *others]
        return self._renderer.tokenise_prompts([self._renderer.render_prompt(_row(messages))])[0]

    def _takes_system(self) -> bool:
        """Whether the chat template knows a system message. Raises DataError where it can't even write the user's."""
        user = {"role": "user", "content": "a question"}
        self._renderer.render_prompt(_row([user]))
        try:
            text = self._renderer.render_prompt(_row([{"role": "system", "content": "some rules"}, user])).text
        except DataError:
            return False
        return "some rules" in text

    def _harmless(self, text: str) -> str:
        for special in self._specials:
            text = text.replace(special, f"{special[0]} {special[1:]}")
        return text

    def _work(self) -> None:
        """Answers what waits, until nothing does."""
        while True:
            seen = -1
            while seen != len(self._waiting):
                seen = len(self._waiting)
                time.sleep(_GATHER)
            with self._lock:
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._working = False
                    return
            # Whoever asked may have given up, and then its answer is not sampled.
            batch = [(prompt, answer) for prompt, answer in batch if answer.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[tuple[Prompt, Future[Completion]]]) -> None:
        sampling = Sampling(self.settings.max_tokens, temperature=self.settings.temperature or 0.0)
        try:
            with self._engine_lock:
                groups = self._engine.generate([prompt for prompt, _ in batch], 1, sampling)
        except Exception as error:
            failed = JudgeError(f"the judge's engine failed: {describe_error(error)}")
            for _, answer in batch:
                answer.set_exception(failed)
            return
        for (_, answer), group in zip(batch, groups, strict=True):
            answer.set_result(group[0].completion)


class LocalJudges:
    """Makes the judges that a recipe names without a `base_url`, on `device` (default: this process's own), in the type that their
    model was saved in (bfloat16 or float32). Judges of the same model share it.

    Example: RewardRunner(specs, make_judge=LocalJudges("cuda:0"))
    """

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        self._made: dict[str, Any] = {}

    def __call__(self, settings: JudgeSettings) -> EngineJudge:
        """Raises ConfigError for a model that can't be loaded or has no chat template."""
        if settings.model not in self._made:
            self._made[settings.model] = self._load(settings.model)
        make: Any = self._made[settings.model]
        judge: EngineJudge = make(settings)
        return judge

    def _load(self, name: str) -> Any:
        import torch

        from llmrl.models.load import stop_token_ids
        from llmrl.models.source import Source, check_vocabulary
        from llmrl.rollout.local import LocalEngine

        device = torch.device(self._device or local_device())
        key = "judge.model (loaded in this process, as the judge has no base_url)"
        saved = Source(ModelFields(model_name_or_path=name), key=key).config.dtype
        fields = ModelFields(model_name_or_path=name, dtype="bfloat16" if saved == torch.bfloat16 else "float32")
        source = Source(fields, key=key)
        tokenizer = source.tokenizer()
        if not tokenizer.chat_template:
            raise ConfigError(f"judge.model: the tokenizer of {name} has no chat template; give an instruct model")
        model = source.model()
        check_vocabulary(model, tokenizer)
        model = source.adapted(model).eval().requires_grad_(False).to(device)
        stop_ids = stop_token_ids(model, tokenizer)
        # The thread that samples has device 0 as its own, whatever the process has.
        context = partial(torch.cuda.device, device) if device.type == "cuda" else nullcontext
        engine = LocalEngine(
            model, tokenizer, stop_token_ids=stop_ids, max_batch_tokens=_BATCH_TOKENS, autocast=context
        )
        positions = getattr(engine.config, "max_position_embeddings", None)
        return partial(EngineJudge, engine, tokenizer, stop_ids=stop_ids, max_length=positions, lock=threading.Lock())


def _row(messages: Messages) -> PromptRow:
    return PromptRow(messages, None, {}, {}, "judge")
