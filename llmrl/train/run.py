"""A run: where it starts, what it records, when it saves, how it ends. Algorithms' loops stay small because of it.

with run:
    for step in run.steps():
        metrics = ...
        run.log(step, metrics, tokens=...)
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import nn

from llmrl.config.load import dump_recipe
from llmrl.errors import LLMRLError
from llmrl.train.backend import Backend
from llmrl.train.card import write_card
from llmrl.train.checkpoint import CheckpointError, CheckpointStore, step_of, written
from llmrl.train.files import publish, require_writable
from llmrl.train.plot import plot_curves
from llmrl.train.progress import Progress
from llmrl.train.records import Records, environment, metric_row
from llmrl.train.resume import find_start, longer_schedule
from llmrl.train.trackers import Trackers


class Stateful(Protocol):
    """What a checkpoint keeps beside model and optimizer; the state is JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Run:
    """The run directory `config.output_dir` and the bookkeeping of the loop.

    Files: config.yaml, metrics.jsonl, samples/, checkpoints/, summary.json (status: running, finished, stopped or failed), and at
    the end model/ (with its card, README.md) and curves.png. `stateful` objects and the weights of `modules` (a critic, a moving reference) are saved in checkpoints
    and restored by name; `gather_model()` gives what writes the model into a directory, `load_model(directory)` reads it; all processes call them. `callbacks` are objects with any of on_train_begin(trainer),
    on_step_end(trainer, step, metrics) -> True to stop, on_save(path), on_train_end(trainer).

    Making a Run decides where it starts; raises ConfigError when the directory holds another run (see `resume` in the recipe).
    """

    def __init__(
        self,
        config: Any,
        backend: Backend,
        *,
        kind: str,
        total_steps: int,
        gather_model: Callable[[], Callable[[Path], None]],
        load_model: Callable[[Path], None],
        stateful: Mapping[str, Stateful] | None = None,
        modules: Mapping[str, nn.Module] | None = None,
        callbacks: Sequence[Any] = (),
        trainer: Any = None,
    ) -> None:
        self.config, self.backend, self.kind, self.total_steps = config, backend, kind, total_steps
        self.gather_model, self.load_model = gather_model, load_model
        self.stateful, self.modules = dict(stateful or {}), dict(modules or {})
        self.callbacks, self.trainer = list(callbacks), trainer
        self.directory = Path(config.output_dir)
        self.store = CheckpointStore(self.directory / "checkpoints", keep=config.save_total_limit)
        self.records = Records(self.directory)
        self.step = 0
        self.summary: dict[str, Any] = {}
        self.best: dict[str, Any] | None = None
        self._metrics: dict[str, Any] = {}
        self._seconds, self._num_tokens = 0.0, 0
        self._saved_step: int | None = None
        self._sigterm = self._finished = False
        self._previous_handler: Any = None
        start = self._on_main(self._find_start)
        self._start = Path(start) if start else None
        self.progress = Progress(kind, total_steps, shown=backend.is_main, num_samples=config.num_samples_logged)

    def __enter__(self) -> Run:
        self._began = time.monotonic()
        if self._start is not None:
            self._load(self._start)
        self._on_main(self._open)
        self.backend.standing.guarding = True
        self.trackers = Trackers(
            self.backend.accelerator,
            self.config.report_to,
            self.config.run_name or self.directory.name,
            self.config.model_dump(mode="json"),
        )
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        self.progress.start(self.step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None
        lost = None if error is None else self.backend.standing.explain(error)
        error = lost or error
        self.backend.standing.end(error)
        self.progress.stop()
        self.trackers.finish()
        status = "finished" if self._finished else "stopped"
        if error is not None and isinstance(error, Exception):
            status = "failed"
        self._summarise(status, f"{type(error).__name__}: {error}" if error is not None else None)
        if lost is not None:
            raise lost
        if error is None:
            self._call("on_train_end", self.trainer)

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 1; after the body of each, checkpoint and signals are seen to.

        On SIGTERM of any process a checkpoint is saved and SystemExit raised with `sigterm_exit_code`. After the last step the
        final model is in `<output_dir>/model`.
        """
        self._call("on_train_begin", self.trainer)
        while self.step < self.total_steps:
            self._step_began = time.monotonic()
            self.backend.standing.begin_step(self.step + 1)
            yield self.step + 1
            self.step += 1
            wishes = [bool(result) for result in self._call("on_step_end", self.trainer, self.step, self._metrics)]
            sigterm, stop = self._agree(self._sigterm, any(wishes))
            last = stop or self.step == self.total_steps
            better = self._is_best()
            if better or last or sigterm or (self.config.save_steps and self.step % self.config.save_steps == 0):
                self.save()
            if better:
                self._on_main(lambda: self.store.call_best(self.step))
            if sigterm and not last:
                self.progress.message(f"SIGTERM: saved step {self.step}; the same command continues from it")
                raise SystemExit(self.config.sigterm_exit_code)
            if last:
                break
        self._finish()

    def due(self, every: int | None, step: int) -> bool:
        """True at every `every`-th step and at the last one; None: only at the last one."""
        return step == self.total_steps or bool(every and step % every == 0)

    def log(self, step: int, metrics: Mapping[str, Any], *, tokens: int | None = None) -> None:
        """Records the numbers of a step, which are the same on every process; `tokens` are those that it trained on, over all of them."""
        seconds = time.monotonic() - self._step_began
        row = {"step": step, **metric_row(metrics), "step_time": seconds}
        if tokens is not None:
            self._num_tokens += int(tokens)
            row |= {"tokens_per_second": tokens / max(seconds, 1e-9), "num_tokens": self._num_tokens}
        if self.backend.skipped_updates:
            row["skipped_updates"] = self.backend.skipped_updates
        self._metrics = row
        if self.backend.is_main:
            self.records.add_metrics(row)
            self.trackers.log(step, row)
            self.progress.step(step, row)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records sample completions; each process gives its own."""
        plain = json.loads(json.dumps(list(rows), default=str))
        everyone = [row for part in self.backend.gather_json(plain) for row in part]
        if self.backend.is_main:
            self.records.add_samples(step, everyone)
            self.progress.samples(step, everyone)

    def save(self) -> None:
        """Writes the checkpoint of the current step, unless it is there. Raises CheckpointError on every process when it can't be."""
        if self._saved_step == self.step:
            return
        with self.backend.standing.during("saving", patient=True):
            self._save(self.step, self.backend)
        self._saved_step = self.backend.standing.saved_step = self.step
        self._call("on_save", self.store.path(self.step))

    def _save(self, step: int, backend: Backend) -> None:
        # First what takes all processes, then what may fail on one of them: none is left waiting for another.
        directory = Path(self._on_main(lambda: str(self.store.begin(step))))
        try:
            write = self._gather()
            files = backend.gather_json(backend.together(lambda: write(directory)))
            self._on_main(lambda: str(self.store.finish(step, {k: v for part in files for k, v in part.items()})))
        except BaseException:
            if backend.is_main:
                self.store.abandon(step)
            raise

    def _gather(self) -> Callable[[Path], dict[str, dict[str, Any]]]:
        """What writes this process's part of a checkpoint and describes its files."""
        model, optimizer = self.gather_model(), self.backend.gather_state()
        modules = {name: self.backend.whole_tensors(module) for name, module in self.modules.items()}

        def write(directory: Path) -> dict[str, dict[str, Any]]:
            with self.store.explained(self.step):
                files = optimizer(directory)
                if not self.backend.is_main:
                    return written(directory, files)
                self.records.flush()
                model(directory / "model")
                for name, tensors in modules.items():
                    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / f"{name}.safetensors")
                (directory / "state.json").write_text(json.dumps(self._state(), indent=1), encoding="utf-8")
                ours = [*files, *directory.rglob("model/*"), *(directory / f"{name}.safetensors" for name in modules)]
                return written(directory, [*ours, directory / "state.json"])

        return write

    def _is_best(self) -> bool:
        """Whether `metric_for_best_model` is better after this step than after any before it; it is noted if so."""
        name = self.config.metric_for_best_model
        if name is None or self._metrics.get("step") != self.step:
            return False
        value = self._metrics.get(name)
        if value is None or not math.isfinite(value):
            evaluated = [key for key in self._metrics if key.startswith("eval_")]
            if evaluated and name not in evaluated:
                self.progress.message(
                    f"metric_for_best_model {name} is not a number of this evaluation: {', '.join(evaluated)}"
                )
            return False
        sign = 1 if self.greater_is_better else -1
        if self.best is not None and sign * value <= sign * self.best["value"]:
            return False
        self.best = {"metric": name, "value": value, "step": self.step}
        return True

    @property
    def greater_is_better(self) -> bool:
        given = self.config.greater_is_better
        return not str(self.config.metric_for_best_model).endswith("loss") if given is None else bool(given)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "best": self.best,
            "kind": self.kind,
            "total_steps": self.total_steps,
            "seconds": self._seconds + time.monotonic() - self._began,
            "num_tokens": self._num_tokens,
            "metrics": self._metrics,
            "stateful": {name: item.state_dict() for name, item in self.stateful.items()},
            "recipe": self.config.model_dump(mode="json"),
        }

    def _load(self, start: Path) -> None:
        """Every process reads the checkpoint; on several machines output_dir must be on a file system that they share."""
        if not (start / "state.json").is_file():
            raise CheckpointError(
                f"rank {self.backend.rank} does not see {start}: put output_dir where all machines see it"
            )
        state = json.loads((start / "state.json").read_text(encoding="utf-8"))
        self.load_model(start / "model")
        for name, module in self.modules.items():
            file = start / f"{name}.safetensors"
            self.backend.fill(module, self.backend.load(partial(load_file, file), dict))
        self.backend.load_state(start)
        if missing := self.stateful.keys() - state["stateful"].keys():
            raise CheckpointError(
                f"{start} has no state of {', '.join(sorted(missing))}: another version of llmrl wrote it"
            )
        for name, item in self.stateful.items():
            item.load_state_dict(state["stateful"][name])
        self.step, self._seconds, self._num_tokens = state["step"], state["seconds"], state["num_tokens"]
        self._metrics = state["metrics"]
        self.backend.standing.saved_step = self.step
        if start.resolve().parent == self.store.root.resolve():
            self._saved_step = self.step
            best = state.get("best")
            if best and best["metric"] == self.config.metric_for_best_model:
                self.best = best

    def _find_start(self) -> str:
        start = find_start(self.config, self.kind, self.store)
        require_writable(self.directory)
        return str(start or "")

    def _open(self) -> None:
        """The run directory at the start: records rewound to the checkpoint, recipe and summary written."""
        self.records.rewind(self.step)
        self.records.write_config(dump_recipe(self.config))
        self.store.call_best(self.best["step"] if self.best else None)
        if self._start is not None:
            if self._saved_step is not None:
                self.store.point_to(self.store.path(step_of(self._start)))
            self.progress.message(f"continuing from {self._start}, step {self.step} of {self.total_steps}")
            state = json.loads((self._start / "state.json").read_text(encoding="utf-8"))
            if note := longer_schedule(state, self.config, self.total_steps):
                self.progress.message(note)
            if self.step >= self.total_steps:
                self.progress.message("nothing left to do; raise max_steps to go on, or choose another output_dir")
        self._summarise("running", None)

    def _finish(self) -> None:
        name = self.config.run_name or self.directory.name
        save_model = self.gather_model()

        def write() -> None:
            temporary = self.directory / ".tmp_model"
            shutil.rmtree(temporary, ignore_errors=True)  # a kill may have left one
            save_model(temporary)
            model = self.directory / "model"
            publish(temporary, model)  # first: what is said of the model must not stand in its way
            write_card(model, name=name, run=self.directory, step=self.step, source=self.config.model_name_or_path)
            if self._metrics:
                plot_curves(self.directory)

        with self.backend.standing.during("writing the model", patient=True):
            self._on_main(write)
        self._finished = True

    def _summarise(self, status: str, error: str | None) -> None:
        self.summary = {
            "status": status,
            "kind": self.kind,
            "step": self.step,
            "total_steps": self.total_steps,
            "seconds": self._seconds + time.monotonic() - self._began,
            "output_dir": str(self.directory),
            "metrics": self._metrics,
            **({"best": {**self.best, "checkpoint": str(self.store.path(self.best["step"]))}} if self.best else {}),
            **environment(self.backend.device, self.backend.world_size),
            **({"error": error} if error else {}),
        }
        if self.backend.is_main:
            self.records.write_summary(self.summary)

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0; its result, or its error, reaches every process, so that none waits for a dead one."""
        result, error = None, None
        if self.backend.is_main:
            try:
                result = action()
            except Exception as caught:
                error = caught
        other = self.backend.broadcast_json([result, str(error) if error is not None else None])
        if error is not None:
            raise error
        if other[1] is not None:
            raise LLMRLError(f"rank 0 failed: {other[1]}")
        return other[0]

    def _agree(self, *flags: bool) -> list[bool]:
        """Each flag: is it set on any process?"""
        return [count > 0 for count in self.backend.global_sum([float(flag) for flag in flags])]

    def _call(self, name: str, *args: Any) -> list[Any]:
        return [getattr(callback, name)(*args) for callback in self.callbacks if hasattr(callback, name)]

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._sigterm = True
