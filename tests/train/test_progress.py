"""What the display says, on a terminal and without one."""

from __future__ import annotations

import io

from rich.console import Console

from llmrl.train.progress import Progress, clip, duration


def shown(terminal, total=100, steps=(1, 2, 5, 100), **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160, color_system=None)
    progress = Progress("grpo", total, console=console, **options)
    progress.start(0)
    for step in steps:
        progress.step(
            step,
            {"loss": 0.25, "reward": 0.5, "completions/mean_length": 31.4, "kl": 0.01234, "tokens_per_second": 1234.5},
        )
        progress.samples(step, [{"prompt": f"2+{step}=", "completion": "[bold]7\x1b[31m\nso 7", "reward": 1.0,
                                 "parts": {"math": 1.0, "length": None}, "outcomes": {"math": "score", "length": "timeout"},
                                 "milliseconds": {"math": 0.1234}, "notes": {"math": "read\x1b 7"},
                                 "advantage": -0.5, "finish_reason": "length"}])  # fmt: skip
    progress.message("hello [x]")
    progress.stop()
    return out.getvalue()


def test_lines_without_a_terminal():
    text = shown(False)
    lines = [line for line in text.splitlines() if line.startswith("grpo step")]
    assert [line.split()[2] for line in lines] == ["1/100", "5/100", "100/100"]
    assert "loss 0.2500  reward 0.500  length 31  kl 0.0123  tok/s 1,234  eta" in lines[0]
    assert "eta" not in lines[-1]
    assert "grpo: hello [x]" in text
    assert text.count("samples of step") == 1 and "samples of step 100" in text


def test_the_sample_table_shows_text_as_it_is_and_nothing_that_steers_the_terminal():
    text = shown(False)
    assert "[bold]7 [31m⏎so 7 [cut]" in text and "\x1b" not in text
    assert "math 1.00, 0.123 ms: read" in text and "length timeout" in text and "-0.50" in text


def test_a_terminal_gets_one_live_display():
    text = shown(True)
    assert "step 100/100" in text and "samples of step 100" in text and "hello [x]" in text


def test_other_processes_are_silent():
    assert shown(False, shown=False) == ""
    assert "samples of" not in shown(False, num_samples=0)


def test_clip_keeps_both_ends():
    assert clip("short\tone", 20) == "short one"
    assert clip("a" * 50 + "z" * 50, 21) == "a" * 9 + " … " + "z" * 9


def test_durations():
    assert [duration(s) for s in (0, 65.4, 7385)] == ["0:00", "1:05", "2:03:05"]


def test_a_pass_before_the_first_step():
    for terminal, shown_here in ((False, True), (True, True), (False, False)):
        out = io.StringIO()
        progress = Progress("dpo", 10, shown=shown_here, console=Console(file=out, force_terminal=terminal, width=80))
        with progress.pass_over(2000, "reference") as advance:
            for _ in range(4):
                advance(500)
        assert ("dpo: reference: 2,000 in 0:00\n" in out.getvalue()) == shown_here
        assert ("\x1b" in out.getvalue()) == (terminal and shown_here)
