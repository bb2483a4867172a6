"""The published figures that results stand beside, as data, and whether a result may be compared with one.

Figures are as printed in the reports: percent where nothing else is said. What a report leaves open (the prompts of the
base models, for one) is nobody's to compare, and `incomparable` does not pretend to know it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .items import plural
from .results import Result
from .tasks import TASKS

V3_BASE, V3, R1, R1_ZERO = "V3-Base", "V3", "R1", "R1-Zero"
MODELS = (V3_BASE, V3, R1)  # the columns of a report
V3_REPORT, R1_REPORT = "DeepSeek-V3 report, arXiv 2412.19437", "DeepSeek-R1 report, arXiv 2501.12948"

ACCURACY, LIKELIHOOD, F1, BPB = "accuracy", "accuracy by likelihood", "F1", "bits per byte"
RATING, PERCENTILE, CONSENSUS, WINS = "rating", "percentile", "cons@64", "win rate"
NOTHING_SHOWN = 0


@dataclass(frozen=True)
class Published:
    """One figure of a report.

    benchmark: the name of our task where there is one. protocol: of protocols.PROTOCOLS, or that which is nearest to
    what the report did. shots: None where the source at hand does not say. metric: what the figure is. digits: behind
    the decimal point, as printed.
    """

    model: str
    benchmark: str
    title: str
    value: float
    protocol: str
    shots: int | None
    metric: str
    source: str
    note: str = ""

    @property
    def digits(self) -> int:
        if self.metric == BPB:
            return 3
        return 0 if self.metric == RATING else 1


# benchmark -> (title, metric of base models, metric of chat models)
_TITLES: dict[str, tuple[str, str, str]] = {
    "mmlu": ("MMLU", LIKELIHOOD, ACCURACY),
    "mmlu-redux": ("MMLU-Redux", LIKELIHOOD, ACCURACY),
    "mmlu-pro": ("MMLU-Pro", LIKELIHOOD, ACCURACY),
    "bbh": ("BBH", ACCURACY, ACCURACY),
    "drop": ("DROP", F1, F1),
    "humaneval": ("HumanEval", ACCURACY, ACCURACY),
    "humaneval-mul": ("HumanEval-Mul", ACCURACY, ACCURACY),
    "mbpp": ("MBPP", ACCURACY, ACCURACY),
    "livecodebench": ("LiveCodeBench", ACCURACY, ACCURACY),
    "gsm8k": ("GSM8K", ACCURACY, ACCURACY),
    "math": ("MATH", ACCURACY, ACCURACY),
    "math500": ("MATH-500", ACCURACY, ACCURACY),
    "aime24": ("AIME 2024", ACCURACY, ACCURACY),
    "cnmo24": ("CNMO 2024", ACCURACY, ACCURACY),
    "gpqa": ("GPQA-Diamond", ACCURACY, ACCURACY),
    "mgsm": ("MGSM", ACCURACY, ACCURACY),
    "cmath": ("CMath", ACCURACY, ACCURACY),
    "arc-easy": ("ARC-Easy", LIKELIHOOD, ACCURACY),
    "arc-challenge": ("ARC-Challenge", LIKELIHOOD, ACCURACY),
    "hellaswag": ("HellaSwag", LIKELIHOOD, ACCURACY),
    "piqa": ("PIQA", LIKELIHOOD, ACCURACY),
    "winogrande": ("WinoGrande", LIKELIHOOD, ACCURACY),
    "triviaqa": ("TriviaQA", ACCURACY, ACCURACY),
    "nq": ("NaturalQuestions", ACCURACY, ACCURACY),
    "agieval": ("AGIEval", ACCURACY, ACCURACY),
    "cruxeval-i": ("CRUXEval-I", ACCURACY, ACCURACY),
    "cruxeval-o": ("CRUXEval-O", ACCURACY, ACCURACY),
    "ceval": ("C-Eval", LIKELIHOOD, ACCURACY),
    "cmmlu": ("CMMLU", LIKELIHOOD, ACCURACY),
    "cluewsc": ("CLUEWSC", ACCURACY, ACCURACY),
    "pile": ("Pile-test", BPB, BPB),
    "ifeval": ("IFEval", ACCURACY, ACCURACY),
    "simpleqa": ("SimpleQA", ACCURACY, ACCURACY),
    "frames": ("FRAMES", ACCURACY, ACCURACY),
    "longbench2": ("LongBench v2", ACCURACY, ACCURACY),
    "swe-verified": ("SWE-bench Verified", ACCURACY, ACCURACY),
    "aider-polyglot": ("Aider-Polyglot", ACCURACY, ACCURACY),
    "codeforces": ("Codeforces", PERCENTILE, PERCENTILE),
    "arena-hard": ("Arena-Hard", WINS, WINS),
    "alpacaeval2": ("AlpacaEval 2.0 LC", WINS, WINS),
}


def _base(benchmark: str, value: float, shots: int) -> Published:
    title, metric, _ = _TITLES[benchmark]
    return Published(V3_BASE, benchmark, title, value, "base", shots, metric, f"{V3_REPORT}, section 4.4")


def _chat(model: str, benchmark: str, value: float, metric: str | None = None, note: str = "") -> Published:
    title, _, usual = _TITLES[benchmark]
    source = f"{V3_REPORT}, section 5.3" if model == V3 else f"{R1_REPORT}, section 3"
    # What was shown for DROP, the sources at hand do not say; the other chat benchmarks are asked as they are.
    shots = None if benchmark == "drop" else NOTHING_SHOWN
    protocol = "v3" if model == V3 else "r1"
    return Published(model, benchmark, title, value, protocol, shots, metric or usual, source, note)


_BASE = (
    _base("pile", 0.548, 0),
    _base("bbh", 87.5, 3),
    _base("mmlu", 87.1, 5),
    _base("mmlu-redux", 86.2, 5),
    _base("mmlu-pro", 64.4, 5),
    _base("drop", 89.0, 3),
    _base("arc-easy", 98.9, 25),
    _base("arc-challenge", 95.3, 25),
    _base("hellaswag", 88.9, 10),
    _base("piqa", 84.7, 0),
    _base("winogrande", 84.9, 5),
    _base("triviaqa", 82.9, 5),
    _base("nq", 40.0, 5),
    _base("agieval", 79.6, 0),
    _base("humaneval", 65.2, 0),
    _base("mbpp", 75.4, 3),
    _base("livecodebench", 19.4, 3),
    _base("cruxeval-i", 67.3, 2),
    _base("cruxeval-o", 69.8, 2),
    _base("gsm8k", 89.3, 8),
    _base("math", 61.6, 4),
    _base("mgsm", 79.8, 8),
    _base("cmath", 90.7, 3),
    _base("cluewsc", 82.7, 5),
    _base("ceval", 90.1, 5),
    _base("cmmlu", 88.8, 5),
)
_V3_LIVE, _R1_LIVE = "problems of August to November 2024", "problems of August 2024 to January 2025"
_CHAT = (
    _chat(V3, "mmlu", 88.5),
    _chat(V3, "mmlu-redux", 89.1),
    _chat(V3, "mmlu-pro", 75.9),
    _chat(V3, "drop", 91.6),
    _chat(V3, "ifeval", 86.1),
    _chat(V3, "gpqa", 59.1),
    _chat(V3, "simpleqa", 24.9),
    _chat(V3, "frames", 73.3),
    _chat(V3, "longbench2", 48.7),
    _chat(V3, "humaneval-mul", 82.6),
    _chat(V3, "livecodebench", 40.5, note=f"with chain of thought, {_V3_LIVE}"),
    _chat(V3, "livecodebench", 37.6, note=f"without chain of thought, {_V3_LIVE}"),
    _chat(V3, "codeforces", 51.6, note="58.7 in the R1 report, which also gives a rating of 1134"),
    _chat(V3, "swe-verified", 42.0),
    _chat(V3, "aider-polyglot", 49.6),
    _chat(V3, "aime24", 39.2),
    _chat(V3, "math500", 90.2),
    _chat(V3, "cnmo24", 43.2),
    _chat(V3, "cluewsc", 90.9),
    _chat(V3, "ceval", 86.5),
    _chat(V3, "arena-hard", 85.5),
    _chat(V3, "alpacaeval2", 70.0),
    _chat(R1, "mmlu", 90.8),
    _chat(R1, "mmlu-redux", 92.9),
    _chat(R1, "mmlu-pro", 84.0),
    _chat(R1, "drop", 92.2),
    _chat(R1, "ifeval", 83.3),
    _chat(R1, "gpqa", 71.5),
    _chat(R1, "simpleqa", 30.1),
    _chat(R1, "frames", 82.5),
    _chat(R1, "livecodebench", 65.9, note=f"{_R1_LIVE}; V3 has 36.2 there"),
    _chat(R1, "codeforces", 96.3),
    _chat(R1, "codeforces", 2029, metric=RATING),
    _chat(R1, "swe-verified", 49.2),
    _chat(R1, "aider-polyglot", 53.3),
    _chat(R1, "aime24", 79.8),
    _chat(R1, "math500", 97.3),
    _chat(R1, "cnmo24", 78.8),
    _chat(R1, "cluewsc", 92.8),
    _chat(R1, "ceval", 91.8),
    _chat(R1, "arena-hard", 92.3),
    _chat(R1, "alpacaeval2", 87.6),
    _chat(R1_ZERO, "aime24", 71.0, note="77.9 in the later version of the report"),
    _chat(R1_ZERO, "aime24", 86.7, metric=CONSENSUS),
    _chat("R1-Zero-Qwen-32B", "aime24", 47.0),
)
# AIME 2024 pass@1 and cons@64, MATH-500, GPQA-Diamond, LiveCodeBench, Codeforces rating
_STUDENTS = {
    "R1-Distill-Qwen-1.5B": (28.9, 52.7, 83.9, 33.8, 16.9, 954),
    "R1-Distill-Qwen-7B": (55.5, 83.3, 92.8, 49.1, 37.6, 1189),
    "R1-Distill-Llama-8B": (50.4, 80.0, 89.1, 49.0, 39.6, 1205),
    "R1-Distill-Qwen-14B": (69.7, 80.0, 93.9, 59.1, 53.1, 1481),
    "R1-Distill-Qwen-32B": (72.6, 83.3, 94.3, 62.1, 57.2, 1691),
    "R1-Distill-Llama-70B": (70.0, 86.7, 94.5, 65.2, 57.5, 1633),
}
STUDENTS = tuple(_STUDENTS)


def _student(model: str, figures: tuple[float, ...]) -> tuple[Published, ...]:
    columns = (
        ("aime24", None),
        ("aime24", CONSENSUS),
        ("math500", None),
        ("gpqa", None),
        ("livecodebench", None),
        ("codeforces", RATING),
    )
    return tuple(
        replace(_chat(model, benchmark, value, metric), source=f"{R1_REPORT}, section 3.2")
        for (benchmark, metric), value in zip(columns, figures, strict=True)
    )


ROWS: tuple[Published, ...] = (*_BASE, *_CHAT, *(row for each in _STUDENTS.items() for row in _student(*each)))

HARNESS = {
    "mmlu": "mmlu",
    "mmlu-pro": "mmlu_pro",
    "bbh": "bbh_cot_fewshot",
    "drop": "drop",
    "gsm8k": "gsm8k",
    "math": "minerva_math",
    "arc-easy": "arc_easy",
    "arc-challenge": "arc_challenge",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "triviaqa": "triviaqa",
    "nq": "nq_open",
    "ceval": "ceval-valid",
    "cmmlu": "cmmlu",
}
"""Benchmarks by the names that lm-eval gives them, where it measures what the report does."""
LM = "lm:"  # begins the name of a task that lm-eval runs
HARNESS_PROTOCOLS = HARNESS_PROTOCOL, HARNESS_CHAT = "lm-eval", "lm-eval, chat"
_OF_HARNESS = {name: benchmark for benchmark, name in HARNESS.items()}
_REFERENCE = {"base": V3_BASE, "v3": V3, "greedy": V3, "r1": R1, HARNESS_PROTOCOL: V3_BASE, HARNESS_CHAT: V3}


def benchmark_of(task: str) -> str:
    """The benchmark that a task runs: "lm:arc_easy" -> "arc-easy"."""
    name = task.removeprefix(LM)
    return _OF_HARNESS.get(name, name) if task.startswith(LM) else name


def rows(benchmark: str | None = None, model: str | None = None) -> list[Published]:
    """The figures of a benchmark, of a model, or of both."""
    return [row for row in ROWS if benchmark in (None, row.benchmark) and model in (None, row.model)]


def figure(benchmark: str, model: str, metric: str | None = None) -> Published | None:
    """One figure; where a model has several of a benchmark, the first that is of this metric."""
    found = rows(benchmark, model)
    return next(
        (row for row in found if metric is not None and same_metric(metric, row.metric)), next(iter(found), None)
    )


def reference(result: Result, model: str | None = None) -> Published | None:
    """The figure that a result is measured against: of `model`, else of the model that its protocol is of."""
    wanted = model or _REFERENCE.get(result.protocol, V3)
    return figure(benchmark_of(result.task), wanted, result.metric)


def same_metric(ours: str, theirs: str) -> bool:
    """Whether two metrics name the same thing: pass@1 is the mean of right answers over samples."""
    plain = ours.partition(", mean over")[0]
    return plain == theirs or {plain, theirs} <= {ACCURACY, "pass@1"}


def incomparable(result: Result, row: Published) -> list[str]:
    """Why `result` says nothing about `row`, in words; empty where it does. What a run had to leave out is in it."""
    reasons = []
    same = result.protocol == row.protocol or (result.protocol == HARNESS_PROTOCOL and row.protocol == "base")
    if not same:
        reasons.append(f"protocol {result.protocol}, not {row.protocol}")
    if row.shots is None:
        reasons.append("the shots of the published figure are not known")
    elif result.shots != row.shots:
        reasons.append(f"{result.shots} shots, not {row.shots}")
    if not same_metric(result.metric, row.metric):
        reasons.append(f"{result.metric}, not {row.metric}")
    if same and result.samples != result.full_samples:
        reasons.append(f"{plural(result.samples, 'sample')} of every item, not {result.full_samples}")
    return [*reasons, *partial(result), *result.flags]


def partial(result: Result) -> Iterable[str]:
    """Why a result is not one of the whole test set."""
    task = TASKS.get(benchmark_of(result.task))
    size = task.size if task is not None else None
    if result.items < result.of:
        yield f"{result.items:,} of {plural(result.of, 'item')}"
    if size is not None and result.of != size:
        yield f"the data has {plural(result.of, 'item')}, the published set {size:,}"
