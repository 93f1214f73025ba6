"""The report: one file, nothing left out in silence, and a page that works in a real browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import time

import pytest

from llmrl.cli.main import main
from llmrl.errors import DataError
from llmrl.evaluation.report import panels, write_report

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)> <!-- \u2028 \ud800'
STEPS, GROUP = 40, 500


def write_run(folder, steps=3, group=4):
    """A GRPO run's records, `steps` x `group` samples; sample i of a step has reward i % 2, except each tenth, which timed out."""
    (folder / "samples").mkdir(parents=True)
    lines = [
        {
            "step": s,
            "loss": 1 / s,
            "reward": s / steps,
            "rewards/math/mean": 0.5,
            "kl": None,
            "odd/number": 3,
            "text": "x",
        }
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for s in range(1, steps + 1):
        rows = []
        for i in range(group):
            reward = None if i % 10 == 9 else float(i % 2)
            rows.append(
                {
                    "prompt_id": f"p{i}", "prompt": [{"role": "user", "content": f"question {i} <b>"}], "reward": reward,
                    "completion": f"{HOSTILE} words of step {s} " + "so on " * (i % 50), "length": i, "finish_reason": "stop",
                    "parts": {"math": reward}, "outcomes": {"math": "timeout" if reward is None else "score"},
                    "notes": {"math": "gold 3, read 4"}, "milliseconds": {"math": 1.25}, "advantage": 0.5, "version": s,
                }
            )  # fmt: skip
        (folder / "samples" / f"step_{s:08d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("learning_rate: 0.001\n")
    summary = {
        "status": "finished",
        "kind": "grpo",
        "step": steps,
        "total_steps": steps,
        "seconds": 90.0,
        "device": "cpu (test)",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def result(benchmark="tiny"):
    rows = [
        {"id": f"q{i}", "correct": [True, False], "rewards": [1.0, None], "outcomes": ["score", "error"], "answers": ["1", None],
         "lengths": [3, 4], "finish": ["stop", "length"], "completions": ["a \\boxed{1}", "b"], "notes": [None, "it broke"], "meta": {"level": i}}
        for i in range(3)
    ]  # fmt: skip
    return {
        "format": "llmrl-result/1", "benchmark": benchmark, "n": 3, "samples": 2, "accuracy": 0.5, "interval": [0.2, 0.8],
        "pass_at_k": {"1": 0.5, "2": 1.0}, "maj_at_k": None, "format_rate": 0.5, "truncation_rate": 0.5, "mean_length": 3.5, "mean_reward": 1.0,
        "reward_interval": None, "failures": {"error": 3}, "breakdown": {"level": {"0": {"n": 1, "accuracy": 0.5, "interval": [0.1, 0.9]}}},
        "missing": ["q9"], "manifest": {"model": {"name": "a-model"}, "seed": 0}, "per_row": rows,
    }  # fmt: skip


def contents(page):
    """(data, sample rows) out of a page's HTML."""
    text = page.read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    chunks = re.findall(r'class="chunk">(.*?)</script>', text)
    return data, [row for chunk in chunks for row in json.loads(gzip.decompress(base64.b64decode(chunk)))]


def test_everything_is_in_the_file(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "r.json").write_text(json.dumps(result()))
    page = write_report([run, tmp_path / "r.json"])
    assert page == run / "report.html"
    data, rows = contents(page)
    assert len(rows) == len(data["samples"]["id"]) == 3 * 4 + 3 * 2
    assert (
        rows[4]["completion"].startswith(HOSTILE)
        and data["samples"]["step"][4] == 2
        and rows[-1]["notes"] == {"scorer": "it broke"}
    )
    assert data["samples"]["outcome"].count("error") == 3 and data["sources"][0]["recipe"] == "learning_rate: 0.001\n"
    assert "text" not in data["sources"][0]["metrics"] and data["sources"][1]["result"]["missing"] == ["q9"]
    html = page.read_text()
    code = re.sub(r"<script type=.*?</script>|http://www.w3.org/2000/svg", "", html, flags=re.S)
    assert "://" not in code and "<script>document" not in html


def test_too_many_samples_are_thinned_by_whole_steps_and_said(tmp_path):
    run = write_run(tmp_path / "run", steps=5)
    data, rows = contents(write_report([run], tmp_path / "new" / "page.html", max_samples=13))
    assert sorted(set(data["samples"]["step"])) == [1, 3, 5] and len(rows) == 12 and data["sources"][0]["left_out"] == 8
    assert contents(write_report([run], max_samples=3))[0]["sources"][0]["left_out"] == 20


def test_panels():
    found = panels(
        {
            "step": [1],
            "loss": [1],
            "rewards/a/mean": [1],
            "rewards/b/mean": [1],
            "eval_math500/accuracy": [1],
            "odd": [1],
        }
    )
    assert [(p["title"], p["names"]) for p in found if not p["more"]] == [
        ("loss", ["loss"]), ("reward parts", ["rewards/a/mean", "rewards/b/mean"]), ("benchmarks", ["eval_math500/accuracy"])
    ]  # fmt: skip
    assert [p["names"] for p in found if p["more"]] == [["odd"]]


def test_what_can_not_be_reported(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "part.json").write_text(json.dumps({"format": "llmrl-result/1", "per_row": [{"id": "q"}]}))
    for path, message in ((tmp_path, "no run directory"), (tmp_path / "x", "does not exist"), (tmp_path / "other.json", "not a result file"),
                          (tmp_path / "broken.json", "can't be read"), (tmp_path / "part.json", "not whole")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            write_report([path])
    assert main(["report", str(tmp_path / "x")]) == 1 or "does not exist" in capsys.readouterr().err
    (tmp_path / "whole.json").write_text(json.dumps(result()))
    with pytest.raises(DataError, match=r"can't be written: .*give a file"):
        write_report([tmp_path / "whole.json"], tmp_path)
    assert not list(tmp_path.parent.glob(".tmp_*"))
    (write_run(tmp_path / "run") / "summary.json").unlink()  # killed at its first step
    assert main(["report", str(tmp_path / "run")]) == 0 and "report.html" in capsys.readouterr().out


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with ChromeDriver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1800",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_in_a_browser(browser, tmp_path):
    """20,000 samples: drawn, filtered and opened without an error, in light and dark; what a model wrote stays text."""
    (tmp_path / "r.json").write_text(json.dumps(result()))
    page = write_report([write_run(tmp_path / "run", STEPS, GROUP), tmp_path / "r.json"], max_samples=30_000)
    browser.get(page.as_uri())

    def run(script):
        return browser.execute_script(f"return {script}")

    def until(script):
        end = time.monotonic() + 60
        while not run(script):
            assert time.monotonic() < end, f"never: {script}; {count()}"
            time.sleep(0.02)

    def count():
        return run("document.getElementById('count').textContent")

    def fill(name, value):
        run(
            f"(n => {{ n.value = {value!r}; n.dispatchEvent(new Event('input', {{bubbles: true}})) }})(document.getElementById('{name}'))"
        )

    until("document.querySelectorAll('#list .sample').length === 25")
    assert count().startswith("20,006 of 20,006")
    titles = run("[...document.querySelectorAll('.chart h3')].map(n => n.textContent)")
    assert titles == ["loss", "reward", "reward parts"]
    assert run("document.querySelectorAll('.chart path').length") == 3
    assert "50.0%" in run("document.getElementById('overview').textContent") and "a-model" in run(
        "document.body.textContent"
    )
    # Filters: each tenth timed out; of the others every second has reward 1.
    fill("outcome", "timeout")
    until("document.getElementById('count').textContent.startsWith('2,000 of')")
    fill("outcome", "")
    fill("reward-min", "0.5")
    fill("step-max", "2")
    until("document.getElementById('count').textContent.startsWith('400 of')")
    fill("order", "length-down")
    until("document.querySelector('#list .sample .first + .soft').textContent === '497 tokens'")
    fill("text", "words of step 2 ")
    until("document.getElementById('count').textContent.startsWith('200 of')")
    # A sample opens with its parts and notes, and its text is text.
    run("document.querySelector('#list .sample summary').click()")
    until("document.querySelector('#list .sample pre') !== null")
    opened = run("document.querySelector('#list .sample').textContent")
    assert "gold 3, read 4" in opened and "question 497 <b>" in opened and "<img src=x onerror=alert(1)>" in opened
    assert run("document.title") == "run, tiny (r.json)" and run("document.querySelectorAll('#list img').length") == 0
    run("document.querySelector('#curves details').open = true")
    until("document.querySelectorAll('.chart').length === 4")
    colours = []
    for theme in ("light", "dark"):
        run(f"document.documentElement.dataset.theme = {theme!r}")
        colours.append(run("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(246, 247, 249)", "rgb(18, 22, 29)"]
    assert browser.get_log("browser") == []
    requests = run("performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))")
    assert requests == []
