"""The data scripts turn raw files into normalised rows, and refuse what they can't read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "data_scripts"


def convert(script, rows, tmp_path, *args):
    raw, out = tmp_path / "raw.jsonl", tmp_path / "out" / "rows.jsonl"
    raw.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, str(SCRIPTS / script), "--source", str(raw), "--output", str(out), *args]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = out.read_text(encoding="utf-8").split("\n")[:-1] if out.exists() else []
    return done, [json.loads(line) for line in lines]


def test_gsm8k_from_the_published_form(tmp_path):
    rows = [{"question": "How many?\u2028 ", "answer": "3*4=<<3*4=12>>12\n#### 1,012"}]
    done, out = convert("gsm8k.py", rows, tmp_path, "--split", "test")
    assert done.returncode == 0, done.stderr
    assert out == [
        {
            "id": "gsm8k/test/00000",
            "source": "GSM8K test",
            "question": "How many?",
            "solution": "3*4=<<3*4=12>>12",
            "answer": "1012",
        }
    ]
    assert "1 rows, sha256" in done.stdout


def test_gsm8k_without_a_final_answer_is_refused(tmp_path):
    done, out = convert("gsm8k.py", [{"question": "q", "answer": "no marker"}], tmp_path)
    assert done.returncode != 0 and "row 0" in done.stderr and out == []


def test_math500_and_repeated_ids(tmp_path):
    row = {"unique_id": "test/a.json", "problem": "p", "solution": "s", "answer": "1", "subject": "Algebra", "level": 2}
    done, out = convert("math500.py", [row], tmp_path)
    assert done.returncode == 0 and out[0]["id"] == "math500/test/a.json" and out[0]["level"] == 2
    done, _ = convert("math500.py", [row, row], tmp_path)
    assert done.returncode != 0 and "not unique" in done.stderr


def test_hh_keeps_what_differs_in_the_last_answer(tmp_path):
    def row(*texts):
        chosen, rejected = (text.replace("H:", "\n\nHuman: ").replace("A:", "\n\nAssistant: ") for text in texts)
        return {"chosen": chosen, "rejected": rejected}

    rows = [
        row("H:HiA:HelloH:Why?A:So.", "H:HiA:HelloH:Why?A: Who knows\n\nor not? "),
        row("H:HiA:HelloH:Why?A:So.", "H:HiA:HuhH:Why?A:No."),  # they part earlier
        row("H:HiA:Hello", "H:HiA:Hello"),
        row("H:HiA:Hello", "H:HiA: "),
        row("H:HiA:HelloH:Bye", "H:HiA:HelloH:What"),
    ]
    done, out = convert("hh_rlhf.py", rows, tmp_path, "--split", "train")
    assert done.returncode == 0, done.stderr
    assert "4 pairs left out" in done.stdout and [r["id"] for r in out] == ["hh-harmless-base/train/00000"]
    assert [m["content"] for m in out[0]["prompt"]] == ["Hi", "Hello", "Why?"]
    assert out[0]["chosen"] == [{"role": "assistant", "content": "So."}]
    assert out[0]["rejected"] == [{"role": "assistant", "content": "Who knows\n\nor not?"}]


def test_mbpp_from_the_published_form(tmp_path):
    row = {
        "task_id": 2,
        "prompt": "Add. ",
        "code": "def add(): pass",
        "test_imports": [],
        "test_list": ["assert add()"],
        "source_file": "x",
    }
    done, out = convert("mbpp.py", [row], tmp_path)
    assert done.returncode == 0, done.stderr
    assert out == [
        {"id": "mbpp/2", "source": "MBPP sanitized", "prompt": "Add.", "canonical_solution": "def add(): pass", "test_imports": [], "tests": ["assert add()"]}
    ]  # fmt: skip
    assert convert("mbpp.py", out, tmp_path)[1] == out
