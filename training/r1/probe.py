"""What thinking on is worth to a model: its replies to held-out questions, first answers against final ones.

The matrix is grading/reflection.py's. It is taken before and after each stage of reinforcement, so that "it learnt to
reflect" is a number and not a count of words.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ...core.completer import split_reply
from ...grading.answers import exact, final_answer
from ...grading.reflection import Reflection
from ...grading.statistics import wilson
from ..distill.config import DistillConfig, FilterSection, PromptsSection, SamplingSection, TeacherSection
from ..distill.prompts import load_prompts
from ..distill.sampling import KEYS, SAMPLES
from ..distill.worklog import WorkLog
from .config import ProbeSection

SWITCHED = "v3.1"  # a format in which thinking is asked for
Judge = Callable[[str, str], bool]  # (gold, answer)


def probe_settings(
    section: ProbeSection, prompts: tuple[str, ...], model: str, format: str, seed: int, folder: Path
) -> DistillConfig:
    """The samples of a probe, as a distillation without a student."""
    return DistillConfig(
        run_dir=str(folder),
        seed=seed,
        stages=(),
        data=PromptsSection(prompts, section.prompts),
        teacher=teacher_of(Path(model), format, 64),
        sampling=SamplingSection(
            samples=section.samples,
            temperature=section.temperature,
            top_p=section.top_p,
            max_tokens=section.max_tokens,
        ),
        filter=FilterSection(style="any"),
    )


def teacher_of(model: Path, format: str, batch: int) -> TeacherSection:
    """A model of the pipeline as one that writes samples."""
    return TeacherSection(model=str(model), format=format, thinking=format == SWITCHED, batch=batch)


def measure(section: ProbeSection, config: DistillConfig) -> dict[str, Any]:
    """Accuracy, length and the reflection matrix of the samples of a probe."""
    prompts = {prompt.id: prompt for prompt in load_prompts(config.data.prompts, config.data.limit)}
    log = WorkLog(config.run_dir, SAMPLES, KEYS)
    records = [record for record in log.read(log.places().values()) if record["prompt"] in prompts]
    reflection, right = Reflection(), 0
    with ExitStack() as stack:
        judge = open_judge(section, stack)
        for record in records:
            gold = str(prompts[record["prompt"]].columns.get("answer", ""))
            right += _is_right(record, gold, judge)
            reflection.add(record["text"], partial(judge, gold))
    count = max(1, len(records))
    return {
        "model": config.teacher.model,
        "prompts": len(prompts),
        "samples": len(records),
        "accuracy": right / count,
        "accuracy_interval": list(wilson(right, count)),
        "truncated": sum(record["finish_reason"] != "stop" for record in records) / count,
        "mean_tokens": sum(record["tokens"] for record in records) / count,
        "reflection": reflection.report(),
    }


def _is_right(record: Mapping[str, Any], gold: str, judge: Judge) -> bool:
    if record["finish_reason"] != "stop":
        return False
    answer = final_answer(record["text"], whole=True)
    return answer is not None and bool(split_reply(record["text"])[1]) and judge(gold, answer)


def open_judge(section: ProbeSection, stack: ExitStack) -> Judge:
    if section.judge == "exact":
        return lambda gold, answer: exact(answer, gold)
    from ...grading.math import MathGrader
    from ...grading.verdict import Verdict

    grader = stack.enter_context(MathGrader())
    return lambda gold, answer: grader.grade([gold], [answer])[0] == Verdict.RIGHT
