"""The quickstart's corpus is real, large enough, the same each time, and its validation texts are not in its code."""

from pathlib import Path

import pytest

from dsv3.training.data import corpus

pytestmark = pytest.mark.slow  # the text of a whole machine


@pytest.fixture(scope="module")
def sources() -> tuple[corpus.CorpusSource, corpus.CorpusSource]:
    return corpus.machine_sources()


def test_this_machine_has_megabytes_of_code_and_of_language(sources: tuple) -> None:
    code, language = (list(source.documents()) for source in sources)
    assert sum(len(document.text) for document in code) > 5e6
    assert sum(len(document.text) for document in language) > 1e6
    for documents in (code, language):
        assert len({document.id for document in documents}) == len(documents)
    assert all(compile(document.text, document.id, "exec") for document in code[:20])
    assert not any("/test/" in f"/{document.id}" or "site-packages" in document.id for document in code)


def test_another_look_finds_the_same(sources: tuple) -> None:
    for source, again in zip(sources, corpus.machine_sources(), strict=True):
        assert source.describe() == again.describe()


def test_docstrings_of_held_out_code_are_held_out(sources: tuple) -> None:
    code, language = (list(source.documents()) for source in sources)
    files = {document.group for document in code}
    docstrings = [document for document in language if ":docstring" in document.id]
    assert len(docstrings) > 100
    assert {document.group for document in docstrings} <= files
    assert all(document.id.startswith(f"{document.group}:") for document in docstrings)


def test_a_python_without_its_library_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="lacks the source of Python's standard library"):
        corpus.machine_sources()
