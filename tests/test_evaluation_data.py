"""Each benchmark is read in the file formats in which it is published: own small samples of every one of them."""

import base64
import gzip
import json
import pickle
import zlib
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.evaluation.items import Data, Kind
from dsv3.evaluation.listing import lines
from dsv3.evaluation.locate import Places
from dsv3.evaluation.reading import read_records
from dsv3.evaluation.runner import check
from dsv3.evaluation.tasks import TASKS, closest, custom


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def put_rows(path: Path, *rows: dict) -> Path:
    """As JSON lines or parquet, by the ending."""
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.Table.from_pylist(list(rows)), path)
        return path
    return put(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(name: str, path: Path) -> Data:
    data = TASKS[name].read(path)
    check(TASKS[name], data)
    return data


# Multiple choice


def test_mmlu_as_its_authors_publish_it(tmp_path):
    rows = 'What falls?,"Up, that is",Down,Left,Right,B\nQ2,a,b,c,d,D\n'
    put(tmp_path / "test" / "high_school_physics_test.csv", rows)
    put(tmp_path / "dev" / "high_school_physics_dev.csv", "Shot?,1,2,3,4,C\n")
    data = read("mmlu", tmp_path)
    first, second = data.items
    assert (first.question, first.choices, first.gold) == ("What falls?", ("Up, that is", "Down", "Left", "Right"), "B")
    assert first.group == second.group == "high_school_physics" and second.gold == "D"
    assert [shot.gold for shot in data.shots["high_school_physics"]] == ["C"]
    prompt = TASKS["mmlu"].ask(first)
    assert prompt == "What falls?\nA. Up, that is\nB. Down\nC. Left\nD. Right\nAnswer:"
    assert TASKS["mmlu"].header(first).endswith("about high school physics.\n\n")


@pytest.mark.parametrize("folder", ["all", "anatomy"])
def test_mmlu_as_parquet(tmp_path, folder):
    row = {"question": "Q", "subject": "anatomy", "choices": ["w", "x", "y", "z"], "answer": 2}
    put_rows(tmp_path / folder / "test-00000-of-00001.parquet", row)
    put_rows(tmp_path / folder / "dev-00000-of-00001.parquet", row)
    if folder == "all":  # copies of the hub hold each subject twice
        put_rows(tmp_path / "anatomy" / "test-00000-of-00001.parquet", row)
    data = read("mmlu", tmp_path)
    assert [(item.gold, item.group) for item in data.items] == [("C", "anatomy")]
    assert list(data.shots) == ["anatomy"]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_mmlu_pro(tmp_path, ending):
    row = {"question_id": 7, "question": "Q", "options": list("abcdefghi"), "answer": "I", "category": "law"}
    put_rows(tmp_path / f"test.{ending}", row | {"answer_index": 8})
    put_rows(tmp_path / f"validation.{ending}", row | {"question_id": 1, "options": ["a", "b", "N/A"], "answer": "A"})
    data = read("mmlu-pro", tmp_path)
    assert [(item.id, item.gold, len(item.choices)) for item in data.items] == [("7", "I", 9)]
    assert data.shots["law"][0].choices == ("a", "b")


def test_gpqa_mixes_its_choices_alike_in_every_run(tmp_path):
    wrong = ",".join(f"Incorrect Answer {i}" for i in (1, 2, 3))
    head = f"Record ID,Question,Correct Answer,{wrong},High-level domain\n"
    rows = "".join(f"rec{i},Q{i},right{i},wrong{i}a,wrong{i}b,wrong{i}c,Physics\n" for i in range(20))
    data = read("gpqa", put(tmp_path / "gpqa_diamond.csv", head + rows))
    for i, item in enumerate(data.items):
        assert item.choices[item.letters.index(item.gold)] == f"right{i}"
    assert len({item.gold for item in data.items}) > 1
    assert [item.choices for item in TASKS["gpqa"].read(tmp_path).items] == [item.choices for item in data.items]


def test_ceval_asks_the_validation_split_whose_answers_are_public(tmp_path):
    put(tmp_path / "val" / "law_val.csv", "id,question,A,B,C,D,answer\n0,问题,甲,乙,丙,丁,A\n")
    put(tmp_path / "dev" / "law_dev.csv", "id,question,A,B,C,D,answer,explanation\n0,例,甲,乙,丙,丁,B,因为\n")
    put(tmp_path / "test" / "law_test.csv", "id,question,A,B,C,D\n0,秘密,甲,乙,丙,丁\n")
    data = read("ceval", tmp_path)
    assert [item.question for item in data.items] == ["问题"]
    assert TASKS["ceval"].ask(data.items[0]).endswith("D. 丁\n答案：")
    assert TASKS["ceval"].tell(data.shots["law"][0]) == "B"


def test_cmmlu(tmp_path):
    put(tmp_path / "test" / "agronomy.csv", ",Question,A,B,C,D,Answer\n0,问题,甲,乙,丙,丁,D\n")
    put(tmp_path / "dev" / "agronomy.csv", ",Question,A,B,C,D,Answer\n0,例,甲,乙,丙,丁,C\n")
    data = read("cmmlu", tmp_path)
    assert [(item.gold, item.group) for item in data.items] == [("D", "agronomy")]
    assert [item.gold for item in data.shots["agronomy"]] == ["C"]


# Mathematics


@pytest.mark.parametrize("name", ["test.jsonl", "test.jsonl.gz", "main/test-00000-of-00001.parquet"])
def test_gsm8k(tmp_path, name):
    path = tmp_path / name
    row = {"question": "How many?", "answer": "She has 48/2 = <<48/2=24>>24.\n#### 1,024"}
    if name.endswith("parquet"):
        put_rows(path, row)
        put_rows(path.with_name("train-00000-of-00001.parquet"), row)
    else:
        put(path, json.dumps(row) + "\n")
        put(tmp_path / "train.jsonl", json.dumps(row) + "\n")
    data = read("gsm8k", tmp_path)
    assert [item.gold for item in data.items] == ["1024"]
    assert TASKS["gsm8k"].tell(data.shots[""][0]) == " She has 48/2 = 24.\n#### 1024"
    assert data.drawn


def test_math_as_its_authors_publish_it(tmp_path):
    row = {"problem": "P", "level": "Level 5", "type": "Algebra", "solution": "So $x = \\boxed{\\frac{1}{2}}$."}
    put(tmp_path / "test" / "algebra" / "1.json", json.dumps(row))
    put(tmp_path / "test" / "algebra" / "2.json", json.dumps(row))
    put(tmp_path / "train" / "algebra" / "9.json", json.dumps(row))
    put(tmp_path / "train" / "algebra" / "10.json", json.dumps(row | {"problem": "[asy]draw();[/asy]"}))
    data = read("math", tmp_path)
    assert [(item.id, item.gold, item.group) for item in data.items] == [
        ("test/algebra/1.json", "\\frac{1}{2}", "Algebra"),
        ("test/algebra/2.json", "\\frac{1}{2}", "Algebra"),
    ]
    assert [shot.question for shot in data.shots[""]] == ["P"]  # a drawing is no example


def test_math500_and_aime(tmp_path):
    row = {"problem": "P", "solution": "..", "answer": "\\text{east}", "subject": "Geometry"}
    row["unique_id"] = "test/a.json"
    data = read("math500", put_rows(tmp_path / "math" / "test.jsonl", row))
    assert [(item.id, item.gold, item.group) for item in data.items] == [("test/a.json", "\\text{east}", "Geometry")]
    aime = read("aime24", put_rows(tmp_path / "aime" / "train.parquet", {"id": 60, "problem": "P", "answer": "033"}))
    assert [(item.id, item.gold) for item in aime.items] == [("60", "33")]
    assert "\\boxed{}" in TASKS["aime24"].chat(aime.items[0])


# Programs


@pytest.mark.parametrize("name", ["HumanEval.jsonl.gz", "HumanEval.jsonl", "test-00000-of-00001.parquet"])
def test_humaneval(tmp_path, name):
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n    '''1'''\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    path = tmp_path / name
    _ = put_rows(path, row) if name.endswith("parquet") else put(path, json.dumps(row) + "\n")
    (item,) = read("humaneval", path).items
    assert item.extra["tests"].endswith("check(one)\n")
    assert TASKS["humaneval"].ask(item) == row["prompt"]


def test_mbpp_asks_ids_11_to_510_and_shows_the_first_ten(tmp_path):
    row = {"text": "Write a function.", "code": "def f(): return 1", "test_list": ["assert f() == 1"], "challenge": []}
    rows = [row | {"task_id": i, "test_setup_code": "import math"} for i in (2, 11, 12, 511)]
    data = read("mbpp", put_rows(tmp_path / "mbpp.jsonl", *rows))
    assert [item.id for item in data.items] == ["11", "12"]
    assert [shot.id for shot in data.shots[""]] == ["2"]
    assert data.items[0].extra["tests"] == "import math\nassert f() == 1\n"
    assert "assert f() == 1" in TASKS["mbpp"].ask(data.items[0])


def test_mbpp_sanitized(tmp_path):
    row = {"task_id": 11, "prompt": "W", "code": "c", "test_imports": ["import re"], "test_list": ["assert 1"]}
    (item,) = read("mbpp", put(tmp_path / "sanitized-mbpp.json", json.dumps([row]))).items
    assert item.extra["tests"] == "import re\nassert 1\n"


def live(**changed) -> dict:
    hidden = json.dumps([{"input": "2\n", "output": "4", "testtype": "stdin"}])
    return {
        "question_id": "abc_a",
        "question_content": "Double it.",
        "starter_code": "",
        "difficulty": "easy",
        "contest_date": "2024-09-01T00:00:00",
        "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode(),
        "metadata": "{}",
    } | changed


METHOD = {
    "starter_code": "class Solution:\n    def double(self, xs: List[int]) -> List[int]:\n        ",
    "public_test_cases": json.dumps([{"input": "[1, 2]", "output": "[2, 4]", "testtype": "functional"}]),
    "private_test_cases": "[]",
    "metadata": json.dumps({"func_name": "double"}),
}


def test_livecodebench_with_its_hidden_tests(tmp_path):
    put_rows(tmp_path / "test.jsonl", live())
    put_rows(tmp_path / "test2.jsonl", live(question_id="3500", contest_date="2025-01-05", **METHOD))
    data = read("livecodebench", tmp_path)
    program, method = data.items
    assert program.extra["cases"] == [("1\n", "2\n"), ("2\n", "4")]
    assert method.extra["tests"] == "assert Solution().double(*[[1, 2]]) == [2, 4]"
    assert data.notes == ("the data has problems of 2024-09-01 to 2025-01-05",)
    assert "class Solution" in TASKS["livecodebench"].chat(method)


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()}, "builtins.print"),
        ({"private_test_cases": "bm90aGluZw=="}, "private_test_cases cannot be unpacked"),
        ({"public_test_cases": "[", "private_test_cases": "[]"}, "public_test_cases is not JSON"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "no test cases"),
        (METHOD | {"metadata": "{}"}, "metadata names no func_name"),
    ],
)
def test_hidden_tests_that_are_none_are_refused(tmp_path, capsys, changed, said):
    with pytest.raises(UserError, match=rf"t.jsonl:1: .*{said}"):
        read("livecodebench", put_rows(tmp_path / "t.jsonl", live(**changed)))
    assert capsys.readouterr().out == ""


# The rest


def test_ifeval_leaves_out_and_says_what_no_rule_covers(tmp_path):
    rows = [
        {"key": 1, "prompt": "P", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]},
        {
            "key": 2,
            "prompt": "P",
            "instruction_id_list": ["length_constraints:number_words", "startend:end_checker"],
            "kwargs": [{"relation": "less than", "num_words": 10}, {"end_phrase": "Bye."}],
        },
        {"key": 3, "prompt": "P", "instruction_id_list": ["other:rule"], "kwargs": [{}]},
        {
            "key": 4,
            "prompt": "P",
            "instruction_id_list": ["language:response_language"],
            "kwargs": [{"language": "de"}],
        },
    ]
    data = read("ifeval", put_rows(tmp_path / "ifeval_input_data.jsonl", *rows))
    assert [item.id for item in data.items] == ["1", "2"]
    assert data.items[1].extra["rules"][0] == {"rule": "words", "at_most": 9}
    assert any("2 of 4 prompts" in note for note in data.notes)


def test_bbh_with_the_worked_examples_of_its_authors(tmp_path):
    tree = {"canary": "x", "examples": [{"input": "not ( True ) is", "target": "False"}]}
    put(tmp_path / "bbh" / "boolean_expressions.json", json.dumps(tree))
    shot = "Q: {} is\nA: Let's think step by step.\nRemember that. So the answer is {}."
    text = "DO NOT TRAIN\n-----\nEvaluate it.\n\n" + "\n\n".join(
        shot.format(*pair) for pair in (("True", "True"), ("not True", "False"), ("False", "False"))
    )
    put(tmp_path / "cot-prompts" / "boolean_expressions.txt", text)
    task, data = TASKS["bbh"], read("bbh", tmp_path)
    (item,) = data.items
    shots = data.shots["boolean_expressions"]
    assert [shot.gold for shot in shots] == ["True", "False", "False"]
    assert task.header(item) == "Evaluate it.\n\n"
    shown = task.ask(shots[1]) + task.tell(shots[1])
    assert shown == "Q: not True is\nA: Let's think step by step.\nRemember that. So the answer is False."
    assert task.ask(item) == "Q: not ( True ) is\nA: Let's think step by step."


def drop_as_json(folder: Path) -> None:
    pair = {
        "question": "How many?",
        "query_id": "q1",
        "answer": {"number": "3", "date": {}, "spans": []},
        "validated_answers": [{"number": "", "date": {"day": "7", "month": "May", "year": ""}, "spans": []}],
    }
    tree = {"nfl_1": {"passage": "Three.", "qa_pairs": [pair]}}
    put(folder / "drop_dataset_dev.json", json.dumps(tree))
    put(folder / "drop_dataset_train.json", json.dumps(tree).replace('"q1"', '"q0"'))


def test_drop_as_its_authors_publish_it(tmp_path):
    drop_as_json(tmp_path)
    data = read("drop", tmp_path)
    (item,) = data.items
    assert (item.id, item.gold, item.extra["golds"]) == ("q1", "3", ["3", "7 May"])
    assert [shot.id for shot in data.shots[""]] == ["q0"]
    assert TASKS["drop"].ask(item) == "Passage: Three.\nQuestion: How many?\nAnswer:"


def test_drop_as_parquet_and_as_simple_evals_has_it(tmp_path):
    spans = {"spans": ["Al", "Bo"], "types": ["span", "span"]}
    row = {"section_id": "s", "query_id": "q", "passage": "P", "question": "Who?", "answers_spans": spans}
    (item,) = read("drop", put_rows(tmp_path / "validation-00000-of-00001.parquet", row)).items
    assert item.extra["golds"] == ["Al, Bo"]
    row = {"context": "Passage: P\nQuestion: Who?\nAnswer:", "completion": " Al", "ref_text": "Al|Al Bo"}
    (item,) = read("drop", put(tmp_path / "x" / "drop_v0_dev.jsonl.gz", json.dumps(row))).items
    assert (item.extra["passage"], item.question, item.extra["golds"]) == ("P", "Who?", ["Al", "Al Bo"])


# One's own


def test_own_questions_take_the_form_that_their_answers_have(tmp_path):
    def made(*rows: dict):
        task, data = custom.read(put_rows(tmp_path / "own.jsonl", *rows), "mine")
        return task, data.items

    task, items = made({"prompt": "2+2=", "answer": 4})
    assert task.kind is Kind.TEXT and task.chat(items[0]) == task.ask(items[0]) == "2+2="
    task, items = made({"question": "2+2?", "answer": "4"}, {"question": "1/2?", "answer": "0.5"})
    assert task.kind is Kind.MATH and "\\boxed{}" in task.chat(items[0])
    task, items = made({"question": "Who?", "answer": "Ada"})
    assert task.kind is Kind.TEXT
    task, items = made({"question": "Which?", "choices": ["a", "b"], "answer": "B"})
    assert task.kind is Kind.CHOICE and items[0].gold == "B" and task.shots == 0


# What is wrong


@pytest.mark.parametrize(
    ("task", "name", "text", "said"),
    [
        ("mmlu", "test/x_test.csv", "Q,a,b,c,d,A\nQ,a,b\n", r"x_test.csv:2: 3 columns instead of 6; mend or remove"),
        ("mmlu", "test/x_test.csv", "Q,a,b,c,d,F\n", r"x_test.csv:1: the answer 'F' is none of A to D"),
        ("mmlu", "test/x_test.csv", "", r"mmlu: no items to ask in these files; expected the folder with dev"),
        ("gsm8k", "test.jsonl", '{"question": "Q", "answer": "12"}', r"test.jsonl:1: the answer does not end in '####"),
        ("gsm8k", "test.jsonl", '{"question": "Q"', r"test.jsonl:1: not JSON \(.*\); mend or remove the line"),
        ("gsm8k", "test.jsonl", "[1]\n", r"test.jsonl:1: list where an object was expected"),
        ("gsm8k", "test.jsonl", '{"q": 1}', r"test.jsonl:1: no column 'answer' \(it has q\)"),
        ("math", "test.jsonl", '{"problem": "P", "solution": "x"}', r"no answer, and no \\boxed\{\} in the solution"),
        ("aime24", "a.jsonl", '{"problem": "P", "answer": "1000"}', r"'1000' is no integer from 0 to 999"),
        ("aime24", "a.parquet", "PAR?", r"a.parquet: not a readable parquet file"),
        ("humaneval", "h.jsonl.gz", None, r"h.jsonl.gz: cannot be read .*is the file whole"),
        ("mbpp", "m.jsonl", '{"task_id": 11, "text": "x", "test_list": "y"}', r"'test_list' must be a list of texts"),
        ("ifeval", "i.jsonl", '{"key": 1, "prompt": "p", "instruction_id_list": ["a"], "kwargs": []}', "an entry for"),
        ("bbh", "x.json", '{"examples": [{"target": "1"}]}', r"x.json, example 1: no input"),
        ("drop", "d.jsonl", '{"context": "x", "ref_text": "y"}', r"d.jsonl:1: the context is not 'Passage"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, task, name, text, said):
    if text is None:
        path = tmp_path / name
        path.write_bytes(gzip.compress(b'{"task_id": "a"}' * 99)[:40])
    else:
        put(tmp_path / name, text)
    with pytest.raises(UserError, match=said) as caught:
        read(task, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", TASKS)
def test_data_that_is_not_there_is_asked_for_by_its_format(tmp_path, task):
    with pytest.raises(UserError, match=rf"^{task}: .*expected {TASKS[task].files[:20]}".replace("(", r"\(")):
        read(task, tmp_path / "nowhere")


def test_two_items_of_one_name_are_refused(tmp_path):
    row = {"task_id": "HumanEval/0", "prompt": "p", "entry_point": "e", "test": "t"}
    with pytest.raises(UserError, match=r"h.jsonl:2: the id 'HumanEval/0' is also at .*h.jsonl:1"):
        read("humaneval", put_rows(tmp_path / "h.jsonl", row, row))


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown kind of file"):
        list(read_records(put(tmp_path / "data.xml", "<a/>")))


def test_csv_with_a_byte_order_mark_and_line_breaks_in_quotes(tmp_path):
    path = put(tmp_path / "a.csv", '\ufeffQuestion,Answer\n"two\nlines",B\n')
    (record,) = read_records(path)
    assert record.text("question") == "two\nlines" and record.text("answer") == "B"


# Where data lies


def test_data_is_found_under_the_names_that_it_is_published_with(tmp_path):
    for name in ("MMLU", "HumanEval.jsonl.gz", "hendrycks_math", "MATH-500", "gpqa_diamond.csv", "ceval-exam"):
        put(tmp_path / name / "x.txt" if "." not in name else tmp_path / name, "x")
    places = Places.parse([str(tmp_path), "gsm8k=/there/gsm8k"])
    found = {task: places.find(task) for task in ("mmlu", "humaneval", "math", "math500", "gpqa", "ceval", "gsm8k")}
    assert {task: path and path.name for task, path in found.items()} == {
        "mmlu": "MMLU",
        "humaneval": "HumanEval.jsonl.gz",
        "math": "hendrycks_math",
        "math500": "MATH-500",
        "gpqa": "gpqa_diamond.csv",
        "ceval": "ceval-exam",
        "gsm8k": "gsm8k",
    }
    assert places.find("mbpp") is None


def test_data_that_is_not_found_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"mbpp: the data is not at .*mbpp; put it there, or give --data mbpp=PATH"):
        Places.parse([str(tmp_path)]).need("mbpp", "mbpp.jsonl")
    with pytest.raises(UserError, match=r"mbpp: the data is missing; give --data mbpp=PATH, where PATH is mbpp.jsonl"):
        Places().need("mbpp", "mbpp.jsonl")
    with pytest.raises(UserError, match="no such folder; give a folder of data sets, or TASK=PATH"):
        Places.parse([str(tmp_path / "no")])


def test_the_list_names_every_task_with_its_files():
    text = " ".join(" ".join(lines()).split())
    for task in TASKS.values():
        assert f" {task.name} " in text and task.files in text
    assert closest("gsm8") == "gsm8k"
