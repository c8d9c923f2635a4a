"""Documents of the benchmarks: their order, and what is wrong with files and rows."""

import gzip
import json

import pytest

from nrt_jax.errors import InputError
from nrt_jax.evaluation.benchmark_data import load_documents, task_manager
from nrt_jax.evaluation.tasks import (
    BENCHMARKS,
    bbh,
    drop,
    gsm8k,
    hendrycks_math,
    humaneval,
    mmlu,
    popqa,
    truthfulqa,
)


@pytest.fixture
def write(tmp_path):
    """Writes a file of the data folder, and gives the folder."""

    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path)

    return write_file


BBH = '{"examples": [{"input": "q", "target": "(A)"}]}'


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def gsm8k_row(gold: str) -> dict[str, str]:
    return {"question": "How many?", "answer": f"2 + 2 = <<2+2=4>>4\n#### {gold}"}


def test_a_document_has_an_id_and_what_the_task_asks(write):
    data_dir = write("gsm8k/test.jsonl", lines(gsm8k_row("4"), gsm8k_row("1,000")))
    docs = gsm8k.load(data_dir=data_dir, version=1.0, config_source="x")["test"]
    assert [doc["id"] for doc in docs] == ["gsm8k/test.jsonl:1", "gsm8k/test.jsonl:2"]
    assert [doc["gold"] for doc in docs] == ["4", "1,000"]
    assert "question" in docs.features


def test_groups_take_turns_so_that_a_limit_has_all_of_them(write):
    for subject in ("anatomy", "virology"):
        rows = "".join(f'"{subject} {n}, which?",1,2,3,4,B\n' for n in range(2))
        data_dir = write(f"mmlu/val/{subject}_val.csv", rows)
    docs = mmlu.load(data_dir=data_dir)["test"]
    assert [doc["question"] for doc in docs] == [
        "anatomy 0, which?",
        "virology 0, which?",
        "anatomy 1, which?",
        "virology 1, which?",
    ]


def test_the_test_split_counts_before_the_validation_split(write):
    write("mmlu/val/anatomy_val.csv", "old,1,2,3,4,A\n")
    data_dir = write("mmlu/test/anatomy_test.csv", "new,1,2,3,4,A\n")
    assert [doc["question"] for doc in mmlu.load(data_dir=data_dir)["test"]] == ["new"]


def test_a_line_separator_within_a_text_ends_no_row(write):
    row = {"question": "a\u2028b?", "answer": "#### 1"}
    data_dir = write("gsm8k/test.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert len(gsm8k.load(data_dir=data_dir)["test"]) == 1


@pytest.mark.parametrize(
    ("name", "content", "module", "parts"),
    [
        ("x", "", gsm8k, ("gsm8k/test.jsonl", "github.com/openai/grade-school-math")),
        ("gsm8k/test.jsonl", "", gsm8k, ("gsm8k/test.jsonl", "no rows")),
        ("gsm8k/test.jsonl", lines(["a"]), gsm8k, ("gsm8k/test.jsonl, row 1", "['a']")),
        ("gsm8k/test.jsonl", '{"question": ', gsm8k, ("gsm8k/test.jsonl, line 1", "no JSON")),
        (
            "gsm8k/test.jsonl",
            lines(gsm8k_row("4"), {"question": "How many?"}),
            gsm8k,
            ("gsm8k/test.jsonl, row 2: answer is missing", "correct it or leave out the row"),
        ),
        (
            "gsm8k/test.jsonl",
            lines({"question": "How many?", "answer": "four"}),
            gsm8k,
            ("row 1: answer has no number after ####",),
        ),
        ("gsm8k/test.jsonl", lines({"question": 5, "answer": "#### 4"}), gsm8k, ("question is 5",)),
        ("mmlu/val/a_val.csv", "q,1,2,3,4\n", mmlu, ("mmlu/val/a_val.csv, row 1: answer is",)),
        ("mmlu/val/a_val.csv", "q,1,2,3,4,E\n", mmlu, ("answer is 'E'", "A, B, C and D")),
        ("mmlu/val/a_val.csv", b"\xff\xfe", mmlu, ("a_val.csv cannot be read",)),
        ("mmlu/test/x", "", mmlu, ("mmlu/test/*.csv or mmlu/val/*.csv",)),
        (
            "truthfulqa/mc_task.json",
            json.dumps([{"question": "q", "mc1_targets": {"a": 1}}]),
            truthfulqa,
            ("truthfulqa/mc_task.json, row 1: mc2_targets is missing",),
        ),
        (
            "truthfulqa/mc_task.json",
            json.dumps([{"question": "q", "mc2_targets": {"a": 0, "b": 0}}]),
            truthfulqa,
            ("mc2_targets has no true answer",),
        ),
        (
            "truthfulqa/mc_task.json",
            json.dumps([{"question": "q", "mc2_targets": {"a": 2}}]),
            truthfulqa,
            ("a label other than 0 and 1",),
        ),
        ("bbh/bbh/snarks.json", BBH, bbh, ("bbh/cot-prompts/snarks.txt", "github.com/suzgun")),
        ("bbh/bbh/snarks.json", "[]", bbh, ("bbh/bbh/snarks.json, row 1", "correct it or leave")),
        ("popqa/popqa_test.json", '[{"question": "q"}]', popqa, ("row 1: aliases is missing",)),
        ("popqa/popqa_test.json", '["q"]', popqa, ("popqa_test.json, row 1: ", "'q' is no obj")),
        (
            "math_test/test.jsonl",
            lines({"solution": "$2$"}),
            hendrycks_math,
            ("no answer in \\boxed",),
        ),
        (
            "drop/drop_v0_dev.jsonl",
            lines({"context": "Passage: p\nQuestion: q\nAnswer:", "ref_text": ""}),
            drop,
            ("drop/drop_v0_dev.jsonl, row 1: ref_text is missing",),
        ),
        ("drop/drop.json", '{"a": {"passage": "p"}}', drop, ("drop/drop.json, row 1: KeyError",)),
        (
            "humaneval/HumanEval.jsonl",
            lines({"prompt": "def f():", "entry_point": "f", "canonical_solution": " pass"}),
            humaneval,
            ("HumanEval.jsonl, row 1: test is missing",),
        ),
    ],
)
def test_what_is_wrong_is_one_line_with_file_row_and_remedy(write, name, content, module, parts):
    with pytest.raises(InputError) as raised:
        module.load(data_dir=write(name, content))
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_cut_archive_is_named(write):
    data_dir = write("a.jsonl.gz", gzip.compress(b'{"question": "q"}\n' * 100)[:-9])
    source = gsm8k.SOURCE.__class__(
        files=("a.jsonl.gz",), read=gsm8k.SOURCE.read, origin="x", hub="x"
    )
    with pytest.raises(InputError, match=r"a\.jsonl\.gz cannot be read .* copy it again"):
        load_documents(source, gsm8k.document, data_dir)


def test_a_data_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--data .*nowhere is no folder"):
        gsm8k.load(data_dir=str(tmp_path / "nowhere"))


def test_without_a_folder_rows_come_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "law"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (doc,) = mmlu.load()["test"]
    assert asked == [("cais/mmlu", "all", "test")]
    assert (doc["gold"], doc["group"], doc["choices"]) == ("C", "law", ["a", "b", "c", "d"])
    assert doc["id"] == "cais/mmlu/all/test:1"


def test_a_hub_that_does_not_answer_is_one_line_with_the_file_to_have(monkeypatch):
    def load_dataset(*names, split):
        raise ConnectionError("cannot reach the hub\nat all")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError) as raised:
        gsm8k.load()
    message = str(raised.value)
    assert "\n" not in message
    for part in ("openai/gsm8k", "cannot reach the hub", "gsm8k/test.jsonl", "--data", "github"):
        assert part in message


def test_every_benchmark_of_the_table_is_a_task_and_every_task_is_in_the_table():
    assert set(task_manager(None).all_tasks) == set(BENCHMARKS)


def test_shots_of_all_27_tasks_of_bbh_come_with_lm_eval_where_rows_come_from_the_hub(monkeypatch):
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *_, split: [{"input": "q", "target": "(A)"}]
    )
    docs = bbh.load()["test"]
    assert [doc["group"] for doc in docs] == list(bbh.KINDS)
    for doc in docs:
        assert len(doc["shots"]) == 3
        for shot in doc["shots"]:
            gold = shot["gold"].rpartition("So the answer is ")[2].removesuffix(".")
            answered = {"group": doc["group"], "gold": gold}
            assert bbh.process_results(answered, [shot["gold"]])["exact_match"] == 1
            assert bbh.process_results(answered, [gold])["exact_match"] == 1
            assert bbh.process_results(answered, [""])["exact_match"] == 0
