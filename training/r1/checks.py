"""What is looked at before a pipeline begins: everything that would otherwise end it hours later."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..chat_data import load_rows
from ..distill.prompts import load_prompts
from ..grpo.prompts import PromptSet
from ..rewards.registry import RewardSection, build
from ..sft.students import is_ours
from .config import R1Config, SamplesSection


def check(config: R1Config) -> None:
    """UserError for settings that lack something, data that is not there, and rows of it that are of no use to the
    rewards of a stage that is still to be done."""
    _check_settings(config)
    for name, files in config.data.to_dict().items():
        for file in files:
            if not Path(file).exists():
                raise UserError(f"data.{name}: {file} does not exist")
    _check_rows(config)


def _check_settings(config: R1Config) -> None:
    if not config.base:
        raise UserError("base is not set: name the directory of the base model")
    if not is_ours(config.base):
        raise UserError(f"base {config.base} is no model of the DeepSeek-V3 family")
    for name, settings in {"zero": config.zero, "dev2": config.dev2, "r1": config.r1}.items():
        if name in config.stages and not settings.rewards:
            raise UserError(f'{name}.rewards is empty: say what is good, for example [{{ name = "accuracy_math" }}]')
    for name, section in _sampled(config).items():
        if name in config.stages and not any(reward.name.startswith("accuracy") for reward in section.rewards):
            raise UserError(f"{name}.rewards has no accuracy reward: nothing would tell right samples from wrong ones")
    if {"zero", "cold_start", "dev2", "rejection", "r1"} & set(config.stages) and not config.data.reasoning:
        raise UserError("data.reasoning is empty: name files of prompts")
    if "r1" in config.stages and config.general_steps and not config.data.general:
        raise UserError("data.general is empty: name files of prompts for the general_steps, or set these to 0")


def _check_rows(config: R1Config) -> None:
    """Each combination of files and rewards once: parsing the gold answers takes a while."""
    data, seen = config.data, list[Any]()

    def fits(stage: str, rewards: Sequence[RewardSection], rows: Sequence[Mapping[str, Any]], files: object) -> None:
        key = files, [(reward.name, reward.options) for reward in rewards]
        if key in seen:
            return
        seen.append(key)
        try:
            with build(rewards) as built:
                built.check_rows(rows)
        except UserError as error:
            raise UserError(f"{stage}: {error}") from None

    for name, settings in {"zero": config.zero, "dev2": config.dev2, "r1": config.r1}.items():
        if name not in config.stages or (Path(config.run_dir) / name / "model").exists():
            continue
        files = settings.data.prompts or data.reasoning
        fits(name, settings.rewards, _rows(files), files)
        if name == "r1" and config.general_steps:
            both, rewards = (*files, *data.general), (*settings.rewards, *config.general_rewards)
            fits("the general steps of r1", rewards, _rows(both), both)
    for name, section in _sampled(config).items():
        if name in config.stages and not (Path(config.run_dir) / name).exists():
            prompts = load_prompts(data.reasoning, section.limit)
            rows = [{**prompt.row(), "_where": prompt.where} for prompt in prompts]
            fits(name, section.rewards, rows, (data.reasoning, section.limit))
    for files in (data.cold_start, data.non_reasoning):
        for _ in load_rows(files):
            pass


def _rows(files: Sequence[str]) -> list[Mapping[str, Any]]:
    prompts = PromptSet.load(files)
    return [{**row, "_where": place} for row, place in zip(prompts.rows, prompts.places, strict=True)]


def _sampled(config: R1Config) -> dict[str, SamplesSection]:
    return {"cold_start": config.cold_start, "rejection": config.rejection}
