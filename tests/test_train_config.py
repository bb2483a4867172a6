"""Settings of a run: read from TOML, typed, overridden by key=value, and wrong ones named in one line."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3.errors import UserError
from dsv3.training.config import PretrainConfig, check_resume
from dsv3.training.r1.config import R1Config
from dsv3.training.settings import Span

SHIPPED = sorted((Path(dsv3.__file__).parent / "training" / "configs" / "pretrain").glob("*.toml"))


def load(tmp_path: Path, text: str = "", *overrides: str) -> PretrainConfig:
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    return PretrainConfig.load(file, overrides)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configurations_load_name_a_model_and_survive_writing(file: Path, tmp_path: Path) -> None:
    config = PretrainConfig.load(file)
    assert config.model.resolve().n_routed_experts > 0
    assert load(tmp_path, config.to_toml()) == config


def test_the_published_recipe_has_the_published_numbers() -> None:
    config = PretrainConfig.load(next(file for file in SHIPPED if file.stem == "v3-paper"))
    model = config.model.resolve()
    assert (model.num_hidden_layers, model.rope_scaling, model.max_position_embeddings) == (61, None, 4096)
    assert (config.init_std, config.optim.betas, config.optim.weight_decay) == (0.006, (0.9, 0.95), 0.1)
    assert config.batch.sequences * config.data.seq_len == 62_914_560


def test_overrides_are_typed_by_the_key_and_the_last_one_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        'length = "150 steps"\n[optim]\nlr = 1e-3\n',
        "optim.lr=2",
        "optim.lr=3e-4",
        "length=20",
        "run_dir=17",
        "optim.bf16_moments=true",
        "optim.betas=[0.8, 0.9]",
        "embedding_std=1",
        "model.base=dsv3-2m",
        "model.num_hidden_layers=3",
        'data.sources={ "a.b/c" = 3 }',
        'sample.prompts=["x = 1", "y"]',
        "batch.ramp.start=2",
        "batch.ramp.over=10M tokens",
    )
    assert config.optim.lr == 3e-4
    assert config.length == Span(20, "steps")
    assert config.run_dir == "17"
    assert config.optim.bf16_moments is True
    assert config.optim.betas == (0.8, 0.9)
    assert config.embedding_std == 1.0
    assert config.model.resolve().num_hidden_layers == 3
    assert config.data.sources == {"a.b/c": 3}
    assert config.sample.prompts == ("x = 1", "y")
    assert config.batch.ramp is not None
    assert config.batch.ramp.over == Span(10**7, "tokens")
    assert load(tmp_path, "embedding_std = 1.0", "embedding_std=none").embedding_std is None


def test_overrides_reach_into_tables_under_names_of_ones_own(tmp_path):
    (tmp_path / "r1.toml").write_text("[students.small]\nsteps = 3")
    config = R1Config.load(tmp_path / "r1.toml", ["students.small.steps=5", "students.other.optim.lr=1e-3"])
    assert config.students["small"].steps == 5
    assert config.students["other"].optim.lr == 1e-3
    with pytest.raises(UserError, match=r"unknown key students.small.stesp; did you mean students.small.steps"):
        R1Config.load(tmp_path / "r1.toml", ["students.small.stesp=5"])


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[optim]\nweight_deca = 0.1", [], "unknown key optim.weight_deca; did you mean optim.weight_decay?"),
        ("", ["optmi.lr=1"], "unknown key optmi; did you mean optim?"),
        ("", ["optim.lr.x=1"], "optim.lr is set as a whole"),
        ("steps = 5", [], "length"),
        ("[optim]\nlr = '3e-4'", [], "optim.lr must be a number, not '3e-4'"),
        ("[optim]\nlr = -1", [], "optim.lr must be above 0, not -1"),
        ("[optim]\nlr = nan", [], "optim.lr must be a finite number"),
        ("", ["optim.lr=fast"], "optim.lr must be a number, not 'fast'"),
        ("seed = true", [], "seed must be a whole number, not True"),
        ("seed = 1.5", [], "seed must be a whole number"),
        ("[data]\nfim_rate = 1.5", [], "data.fim_rate must be at least 0 and at most 1, not 1.5"),
        ("[data.sources]\na = 0", [], 'data.sources."a" must be at least 1'),
        ("[optim]\nbetas = [0.9]", [], "optim.betas must be a list of 2 values"),
        ("precision = 'fp8'", [], "precision must be one of fp32, bf16"),
        ("length = '60%'", [], "length must be in steps or tokens"),
        ("length = 'many'", [], "length must read like"),
        ("optim = 3", [], "optim must be a table"),
        (
            "[[optim.schedule]]\nuntl = 5",
            [],
            "unknown key optim.schedule[0].untl; did you mean optim.schedule[0].until?",
        ),
        ("[batch]\nsequences = 4\nramp = { start = 8 }", [], "batch.ramp.start must be at most"),
        ("optim = 3", ["optim.lr=1"], "optim must be a table"),
        ("", ["data.sources.x=1"], "data.sources is set as a whole"),
        ("", ["optim.lr"], "must read key=value"),
        ("[optim", [], "not a TOML file"),
    ],
)
def test_wrong_settings_are_named_in_one_line(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, text, *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_model_fields_are_checked_by_name(tmp_path: Path) -> None:
    config = load(tmp_path, "[model]\nbase = 'dsv3-2m'\nhiden_size = 64")
    with pytest.raises(UserError, match=r"unknown key model\.hiden_size; did you mean model\.hidden_size"):
        config.model.resolve()
    assert load(tmp_path, "[model]\nbase = 'dsv3-2m'\nq_lora_rank = 0").model.resolve().q_lora_rank is None


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read settings"):
        PretrainConfig.load(tmp_path / "none.toml")


def test_settings_made_in_python_are_checked_alike() -> None:
    with pytest.raises(UserError, match="seed must be at least 0"):
        PretrainConfig(seed=-1)


spans = st.one_of(
    st.builds(Span, st.integers(0, 10**14), st.sampled_from(["steps", "tokens"])),
    st.builds(Span, st.integers(0, 100).map(float), st.just("percent")),
)


@settings(deadline=None)
@given(spans)
def test_spans_read_back_what_they_write(span: Span) -> None:
    assert Span.parse(str(span), "x") == span


@settings(deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    weights=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.integers(1, 9), max_size=3
    ),
    lr=st.floats(1e-12, 10),
    span=spans,
)
def test_any_settings_survive_writing(text: str, weights: dict[str, int], lr: float, span: Span) -> None:
    config = PretrainConfig.from_dict(
        {
            "run_dir": text,
            "data": {"sources": weights},
            "optim": {"lr": lr, "schedule": [{"until": span}]},
            "sample": {"prompts": [text, '"\\\n']},
        }
    )
    import tomllib

    assert PretrainConfig.from_dict(tomllib.loads(config.to_toml())) == config
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_run_resumes_under_new_learning_rates_but_not_on_other_data(tmp_path: Path) -> None:
    old = load(tmp_path)
    assert check_resume(old.to_dict(), old) == []
    assert check_resume(old.to_dict(), load(tmp_path, "", "optim.lr=1e-5", "length=2000")) == ["length", "optim.lr"]
    for override in ("data.seq_len=8", "batch.sequences=32", "seed=1", "model.base=dsv3-2m", "ema_decay=0.9"):
        with pytest.raises(UserError, match="this run was started with"):
            check_resume(old.to_dict(), load(tmp_path, "", override))
    assert old.fingerprint() == load(tmp_path).fingerprint() != load(tmp_path, "", "seed=1").fingerprint()
