"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.grading.sandbox import Sandbox


@pytest.fixture(scope="session")
def v3_data() -> Path:
    """The published tokenizer and facts of DeepSeek-V3, kept outside of the repository; absent, the test is skipped."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "deepseek-v3"
    if not path.is_dir():
        pytest.skip("needs ../shared/data/deepseek-v3, which is not in the repository")
    return path


@pytest.fixture(scope="module")
def box() -> Sandbox:
    """The best wall there is."""
    try:
        return Sandbox(timeout=8.0)
    except UserError as error:
        pytest.skip(str(error))
