"""The parts of the R1 pipeline: published settings, what is refused at once, cold-start traces, reports."""

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import distilling
import pytest
import r1_pipeline as tiny
from tiny_model import fails, save

from dsv3.core.completer import Conversation, Reply, split_reply
from dsv3.core.generate import SamplingParams
from dsv3.errors import UserError
from dsv3.grading.answers import final_answer
from dsv3.parallel.data import DataParallel
from dsv3.training.distill.prompts import load_prompts
from dsv3.training.distill.sampling import KEYS, SAMPLES
from dsv3.training.distill.traces import PASS_RATES, TRACES
from dsv3.training.distill.verify import scores_log
from dsv3.training.distill.worklog import WorkLog
from dsv3.training.grpo.config import GrpoConfig
from dsv3.training.progress import Progress
from dsv3.training.r1.checks import check
from dsv3.training.r1.cold_start import ROWS, ColdStart, by_rules, corrected, rewritten, tidy
from dsv3.training.r1.config import STAGES, ColdStartSection, ProbeSection, R1Config
from dsv3.training.r1.probe import measure, probe_settings
from dsv3.training.r1.report import markdown
from dsv3.training.r1.run import Pipeline
from dsv3.training.rewards.registry import RewardSection
from dsv3.training.sft.config import SftConfig

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
PUBLISHED = R1Config.load(CONFIGS / "r1" / "deepseek-r1-671b.toml")


# --- the published settings ---


@pytest.mark.parametrize("file", sorted((CONFIGS / "r1").glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_configurations_load_and_survive_writing(file: Path) -> None:
    config = R1Config.load(file)
    assert R1Config.from_dict(tomllib.loads(config.to_toml())) == config
    assert config.stages == STAGES and config.students


def test_reinforcement_is_as_published() -> None:
    """32 questions x 16 outputs an update, 16 updates a rollout (DeepSeek-R1 in Nature, supplement)."""
    for stage in (PUBLISHED.zero, PUBLISHED.dev2, PUBLISHED.r1):
        assert (stage.optim.lr, stage.loss.beta, stage.loss.kind, stage.loss.kl) == (3e-6, 0.001, "grpo", "k3")
        assert (stage.group_size, stage.mini_batches, stage.inner_epochs) == (16, 16, 1)
        assert stage.prompts_per_step * stage.group_size == 8192
        assert stage.prompts_per_step // stage.mini_batches == 32
        assert stage.reference_reset * stage.updates_per_step == 400
        assert stage.rollout.max_tokens == 32768
    zero = PUBLISHED.zero
    assert zero.length.value * zero.updates_per_step == 10_400
    assert zero.rollout.temperature == 1.0
    (longer,) = zero.rollout.longer
    assert longer.max_tokens == 65536 and abs(longer.at.value * zero.updates_per_step - 8200) < zero.updates_per_step
    assert [reward.weight for reward in zero.rewards] == [1.0] * 3 and zero.rewards[-1].options == {"style": "r1-zero"}
    dev2 = PUBLISHED.dev2
    assert (dev2.loss.epsilon_low, dev2.loss.epsilon_high, dev2.rollout.temperature) == (10.0, 10.0, 1.0)
    assert any(reward.name == "language" and reward.weight == 1.0 for reward in dev2.rewards)


def test_the_last_reinforcement_has_general_data_in_its_last_400_updates_only() -> None:
    r1 = PUBLISHED.r1
    assert abs(r1.length.value * r1.updates_per_step - 1700) < r1.updates_per_step
    assert PUBLISHED.general_steps * r1.updates_per_step == 400
    assert r1.rollout.temperature == 0.7
    names = [reward.name for reward in (*r1.rewards, *PUBLISHED.general_rewards)]
    assert "constraints" in names and "judge" not in names, "no neural reward unless it is asked for"


def test_fine_tuning_and_students_are_as_published() -> None:
    def rates(config: SftConfig) -> tuple[float, str, float | None]:
        (phase,) = config.optim.schedule
        return config.optim.lr, phase.shape, phase.lr

    for stage in (PUBLISHED.dev1, PUBLISHED.dev3):
        assert rates(stage) == (5e-5, "cosine", 5e-6)
        assert (stage.data.seq_len, stage.batch.samples) == (32768, 128) and 2 <= stage.epochs <= 3
    expected = {
        "qwen-1.5b": 1e-4, "qwen-7b": 8e-5, "llama-8b": 5e-5, "qwen-14b": 7e-5, "qwen-32b": 6e-5, "llama-70b": 2e-5,
    }  # fmt: skip
    assert {name: student.optim.lr for name, student in PUBLISHED.students.items()} == expected
    for student in PUBLISHED.students.values():
        assert rates(student) == (student.optim.lr, "cosine", pytest.approx(student.optim.lr / 10))
        assert (student.data.seq_len, student.batch.samples) == (32768, 64) and 2 <= student.epochs <= 3
        assert student.lora.rank == 0 and student.data.format == "auto"


@pytest.mark.parametrize(
    ("stage", "shipped"),
    [("zero", "r1-zero-paper"), ("dev2", "r1-reasoning-paper"), ("r1", "r1-general-paper")],
)
def test_the_stages_are_the_shipped_runs_of_the_same_name(stage: str, shipped: str) -> None:
    """But for what the pipeline fills in, its data, and the reward for code that goes with these."""
    own, alone = getattr(PUBLISHED, stage), GrpoConfig.load(CONFIGS / "grpo" / f"{shipped}.toml")
    same = {name: getattr(alone, name) for name in ("run_dir", "model", "data", "rewards", "eval", "length")}
    assert replace(own, **same) == alone
    steps = own.length.value - (PUBLISHED.general_steps if stage == "r1" else 0)
    assert steps == alone.length.value


@pytest.mark.parametrize(("stage", "shipped"), [("dev1", "r1-cold-start"), ("dev3", "r1-paper")])
def test_the_fine_tunings_are_the_shipped_runs_of_the_same_name(stage: str, shipped: str) -> None:
    own, alone = getattr(PUBLISHED, stage), SftConfig.load(CONFIGS / "sft" / f"{shipped}.toml")
    data = replace(alone.data, train=(), format="auto")
    assert own == replace(alone, run_dir=own.run_dir, model="", data=data)


# --- what is refused at once ---


def settings(folder: Path, **tables: Any) -> R1Config:
    tiny.write_data(folder)
    if not (folder / "base").exists():
        save(folder / "base", "v3")
    return tiny.config_of(folder, folder / "run", **tables)


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        ({"base": ""}, "base is not set"),
        ({"base": "nowhere"}, "nowhere: no readable config.json there"),
        ({"zero": {}}, "zero.rewards is empty"),
        ({"rejection": {"rewards": [{"name": "format"}]}}, "rejection.rewards has no accuracy reward"),
        ({"data": {}}, "data.reasoning is empty"),
        (
            {"data": {"reasoning": ["nothing.jsonl"]}, "general_steps": 0},
            "data.reasoning: nothing.jsonl does not exist",
        ),
        ({"general_rewards": []}, "the general steps of r1: row 6 ("),
        ({"dev2": {"rewards": [{"name": "constraints"}]}}, "dev2: no row has the column 'rules'"),
    ],
)
def test_what_would_end_it_hours_later_is_said_first(tmp_path: Path, tables: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        check(settings(tmp_path, **tables))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_rows_that_are_of_no_use_are_named_with_their_file_before_anything_runs(tmp_path: Path) -> None:
    config = settings(tmp_path)
    check(config)
    rules = [{"rule": "wrods", "at_most": 3}]
    general = tiny.write_rows(tmp_path / "general.jsonl", [{"prompt": "Go on.", "rules": rules}])
    with pytest.raises(UserError, match=rf"the general steps of r1: row 6 \({general}, line 1\): rules: .*wrods"):
        check(config)
    tiny.write_data(tmp_path)
    tiny.write_rows(tmp_path / "other.jsonl", [{"messages": [{"role": "robot", "content": "x"}]}])
    with pytest.raises(UserError, match="line 1: message 0 has the unknown role 'robot'"):
        check(config)


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        ({"stages": ["dev1", "zero"]}, "stages must be some of zero, cold_start, dev1, .*, in this order"),
        ({"stages": ["sft"]}, r"stages\[0\] must be one of"),
        ({"general_steps": 2}, r"general_steps must be below r1\.length \(2 steps\)"),
        ({"students": {"a/b": {}}}, r"students\.a/b: the name becomes a folder"),
        ({"format": "v3"}, "format must be one of r1, v3.1"),
        ({"dev1": {"lora": {"rank": -1}}}, r"dev1\.lora\.rank must be at least 0"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, tables: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        tiny.config_of(tmp_path, tmp_path / "run", **tables)


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r1.toml").write_text('base = ""\n')
    assert "base is not set" in fails(capsys, "train", "r1", tmp_path / "r1.toml")
    assert "no shipped configuration (deepseek-r1-671b, quickstart)" in fails(capsys, "train", "r1", "nothing")


def test_a_stage_without_the_one_before_it_says_which_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do the stage zero first"):
        tiny.run(settings(tmp_path, stages=["cold_start"]))
    config = settings(tmp_path, stages=["dev1"], data={})
    with pytest.raises(UserError, match="dev1 has nothing to learn from"):
        tiny.run(config)
    with pytest.raises(UserError, match=r"data\.non_reasoning is empty: there is nothing to learn from"):
        tiny.run(settings(tmp_path, stages=["dev3"], data={}))


def test_a_format_with_a_switch_is_asked_to_think(tmp_path: Path) -> None:
    for format, thinks in (("r1", False), ("v3.1", True)):
        pipeline = Pipeline(settings(tmp_path, format=format), "cpu", DataParallel())
        data = pipeline._grpo(pipeline.config.dev2, "dev2", tmp_path, format, ("a.jsonl",)).data
        assert (data.format, data.thinking, data.prompts) == (format, thinks, ("a.jsonl",))
        teacher = pipeline._samples(pipeline.config.rejection, "dev2", format, tmp_path).teacher
        assert (teacher.format, teacher.thinking) == (format, thinks)
        assert pipeline._sft(pipeline.config.dev1, "dev1", ("b.jsonl",), f"{tmp_path}/base").data.format == format


# --- cold start ---

RIGHT = "<think>\nFirst 3+4=7. So 7.\n</think>\n\n<answer>7</answer>"
WRONG = "<think>\nFirst 3+4=8. So 8. And on, and on.\n</think>\n\n<answer>8</answer>"


def test_rules_make_a_chat_of_a_sample_of_r1_zero() -> None:
    made = by_rules(RIGHT, "en")
    assert (made.thought, made.content) == ("First 3+4=7. So 7.", "The answer is \\boxed{7}.")
    assert by_rules(RIGHT, "zh").content == "答案是 \\boxed{7}。"
    assert tidy("a  \n\n\n\nb<｜User｜> <answer>c</answer>") == "a\n\nb c"
    whole = by_rules("<think>x is 7</think><answer>It is \\boxed{7}, as 3 and 4 are 7.</answer>", "en")
    assert whole.content == "It is \\boxed{7}, as 3 and 4 are 7.", "an answer in words stays as it is"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_correction_is_an_attempt_a_doubt_and_the_right_way(language: str) -> None:
    made = corrected(WRONG, RIGHT, language, 0)
    assert made is not None
    attempt, doubt, correction = made.thought.split("\n\n")
    assert attempt == "First 3+4=8. So 8", "up to its first candidate, not what it went on to say"
    assert "8" in doubt and correction == "First 3+4=7. So 7."
    assert final_answer(f"<think>{made.thought}</think>{made.content}") == "7"
    assert len({corrected(WRONG, RIGHT, language, pick) for pick in range(3)}) == 3


def test_no_correction_is_made_of_an_attempt_that_is_not_wrong_or_names_nothing() -> None:
    assert corrected(RIGHT, RIGHT, "en", 0) is None
    doubting = WRONG.replace("So 8.", "So 7. No, so 8.")
    assert corrected(doubting, RIGHT, "en", 0) is None, "its first candidate is the right one"
    silent = "<think>\nWho knows.\n</think>\n\n<answer>8</answer>"
    made = corrected(silent, RIGHT, "en", 0)
    assert made is not None and made.thought.startswith("Who knows.\n\n"), "then all of the thought is the attempt"
    assert corrected("<think>\nWho knows.\n</think>\n\nNobody can tell " + "at all " * 20, RIGHT, "en", 0) is None


def reply(text: str, finish_reason: str = "stop") -> Reply:
    return Reply(text, *split_reply(text), finish_reason, 1)


@pytest.mark.parametrize(
    ("text", "finish_reason", "kept"),
    [
        ("<notes>I add 3 and 4.</notes>\n<summary>So \\boxed{7}.</summary>", "stop", True),
        ("<think>hm</think><notes>I add 3 and 4.</notes><summary>\\boxed{7}</summary>", "stop", True),
        ("<notes>I add 3 and 4.</notes>\n<summary>So \\boxed{8}.</summary>", "stop", False),
        ("<notes>I add 3 and 4.</notes>\n<summary>So \\boxed{7}.</summary>", "length", False),
        ("I add 3 and 4. \\boxed{7}", "stop", False),
    ],
)
def test_a_rewriter_must_keep_form_and_answer(text: str, finish_reason: str, kept: bool) -> None:
    assert (rewritten(reply(text, finish_reason), RIGHT) is not None) == kept


class Rewriter:
    """Rewrites well, but for one trace, where it changes the answer; dies after `lives` replies."""

    name = "rewriter"

    def __init__(self, lives: int = 100) -> None:
        self.lives, self.asked = lives, list[str]()

    def complete(
        self,
        conversations: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams],
        on_reply: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        for index, conversation in enumerate(conversations):
            text = conversation[-1]["content"]
            if self.lives == 0:
                raise UserError("the server is gone")
            self.lives -= 1
            self.asked.append(text)
            number = int(text.partition("How many cats are ")[2].split()[0])
            answer = 99 if number == 2 else number
            assert on_reply is not None
            on_reply(index, reply(f"<notes>Well written.</notes><summary>It is \\boxed{{{answer}}}.</summary>"))
        return []


@pytest.fixture
def zero(tmp_path: Path) -> ColdStart:
    """A stage whose samples are there: of each prompt a right one, of two of them a wrong one, too."""
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", [tiny.row(number) for number in (1, 2, 3)])
    section = ColdStartSection(minimum=4, corrections=0.4, rewards=(RewardSection("accuracy_exact"),))
    samples = tmp_path / "cold" / "samples"
    traces = []
    with WorkLog(samples, SAMPLES, KEYS).open() as log, scores_log(samples, section.rewards).open() as scores:
        for prompt in load_prompts([prompts]):
            gold = int(prompt.columns["answer"])
            for seed, answer in enumerate((gold, gold + 1) if gold < 3 else (gold,)):
                key = {"prompt": prompt.id, "seed": seed}
                text = f"<think> {tiny.thought(answer)} </think> <answer> {answer} </answer>"
                log.append({**key, "text": text, "finish_reason": "stop", "tokens": 9})
                scores.append({**key, "total": 0, "rewards": {"accuracy_exact": float(answer == gold)}})
                if answer == gold:
                    message = {"role": "assistant", "content": f"<answer> {gold} </answer>"}
                    message["reasoning_content"] = tiny.thought(gold)
                    traces.append({"messages": [*prompt.messages, message], "provenance": key, "answer": str(gold)})
    distilling.write_rows(samples / TRACES, traces)
    distilling.write_rows(samples / PASS_RATES, [{}] * 3)
    return ColdStart(section, tmp_path / "cold", [prompts], 0, Progress(False))


def made_rows(stage: ColdStart) -> list[dict[str, Any]]:
    return distilling.read_rows(stage.folder / ROWS)


def test_without_a_rewriter_rules_make_all_traces_and_some_corrections(zero: ColdStart) -> None:
    report = zero.write(None)
    assert (report["from_zero"], report["corrections"], report["rewritten_by_rules"]) == (3, 1, 3)
    assert report["too_few"] and report["wanted"] == 4
    forms = [row["provenance"]["form"] for row in made_rows(zero)]
    assert forms == ["rules", "rules", "rules", "correction"]
    last = made_rows(zero)[-1]
    assert last["provenance"]["wrong_seed"] == 1 and "\n\n" in last["messages"][-1]["reasoning_content"]
    assert json.loads((zero.folder / "report.json").read_text()) == report


def test_a_rewriter_is_believed_where_the_answer_stays_and_asked_once_however_often_it_dies(zero: ColdStart) -> None:
    dying = Rewriter(lives=2)
    with pytest.raises(UserError, match="the server is gone"):
        zero.write(dying)
    assert not (zero.folder / ROWS).exists()
    going_on = Rewriter()
    report = zero.write(going_on)
    assert len(dying.asked) == 2 and len(going_on.asked) == 1
    assert (report["rewritten_by_model"], report["rewritten_by_rules"]) == (2, 1)
    by_form = {row["answer"]: row["provenance"]["form"] for row in made_rows(zero)[:3]}
    assert by_form == {"1": "rewriter", "2": "rules", "3": "rewriter"}
    assert made_rows(zero)[0]["messages"][-1]["reasoning_content"] == "Well written."


# --- probe and report ---


def test_a_probe_counts_replies_by_first_and_final_answer(tmp_path: Path) -> None:
    prompts = (tiny.write_rows(tmp_path / "probe.jsonl", [tiny.row(number) for number in (1, 2, 3, 4)]),)
    config = probe_settings(ProbeSection(), prompts, "model", "r1", 0, tmp_path / "probe")
    texts = {
        1: "<think>\nSo 1. Let me check: so 1.\n</think>\n\nThe answer is \\boxed{1}.",
        2: "<think>\nSo 5. Wait, so 2.\n</think>\n\n\\boxed{2}",
        3: "<think>\nSo 3. Hmm, so 4.\n</think>\n\n\\boxed{4}",
        4: "<think>\nSo 4. Wait",
    }
    with WorkLog(tmp_path / "probe", SAMPLES, KEYS).open() as log:
        for prompt in load_prompts(prompts):
            number = int(prompt.columns["answer"])
            finish = "length" if number == 4 else "stop"
            log.append(
                {"prompt": prompt.id, "seed": 0, "text": texts[number], "finish_reason": finish, "tokens": number}
            )
    found = measure(ProbeSection(), config)
    assert (found["samples"], found["accuracy"], found["truncated"], found["mean_tokens"]) == (4, 0.5, 0.25, 2.5)
    matrix = found["reflection"]
    assert [matrix[cell] for cell in ("right_right", "wrong_right", "right_wrong", "unfinished")] == [1, 1, 1, 1]
    assert matrix["correction_precision"] == 0.5 and matrix["net_gain"] == 0
    page = markdown({"stages": {}, "seconds": {}, "reflection": {"dev2": {"before": {"name": "dev1"} | found}}})
    assert "| before dev2 | dev1 | 50.0%" in page and "| 1 | 1 | 1 | 0 | 0 | 1 | 50.0%" in page


def test_the_report_says_what_is_known_of_each_stage() -> None:
    notes = {
        "zero": {"steps": 5, "loss": 0.1, "reward": 0.25, "completions/clipped_ratio": 0.5},
        "cold_start": {"from_zero": 3, "wanted": 9, "too_few": True, "corrections": 1, "samples": {}},
        "dev1": {"steps": 1200, "loss": 0.51},
    }
    page = markdown({"stages": notes, "reflection": {}, "seconds": {"zero": 2.4, "cold_start/samples": 3.0}})
    assert "| zero | 5 steps, reward 0.250, 50% cut off | 2 |" in page
    assert "3 traces of R1-Zero, 1 with an error found and mended, fewer than the 9 of R1-Zero" in page
    assert "| dev1 | 1,200 steps, loss 0.510 | 0 |" in page and "Reflection" not in page
