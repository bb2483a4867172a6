"""A model behind a server answers like one of this process, whatever the server does meanwhile; and when it is gone for
good, that is said in one line and nothing that was answered is lost."""

import email.utils
import socket
import threading
import time
from collections.abc import Callable, Iterator

import openai_server
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import Server, completion, last_words

from dsv3.core.completer import Completer, Reply
from dsv3.core.endpoint import Endpoint, parse_answer
from dsv3.core.generate import SamplingParams
from dsv3.errors import UserError

GREEDY = SamplingParams(temperature=0.0, max_tokens=9)


@pytest.fixture
def server() -> Iterator[Server]:
    with openai_server.serving() as running:
        yield running


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The back-off as it is, a thousand times faster; returns the seconds that were asked for."""
    asked: list[float] = []

    class Quick(threading.Event):
        """Only events made from now on: libraries have threads of their own that wait for theirs."""

        def wait(self, timeout: float | None = None) -> bool:
            if timeout is None or timeout < 0.9 or threading.current_thread() is threading.main_thread():
                return super().wait(timeout)
            asked.append(timeout)
            return super().wait(timeout / 1000)

    monkeypatch.setattr(threading, "Event", Quick)
    return asked


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(server: Server, count: int = 1, **options: object) -> list[Reply]:
    tutor = Endpoint(server.base, "tutor", **{"timeout": 5.0, **options})  # type: ignore[arg-type]
    return tutor.complete([says(str(i)) for i in range(count)], GREEDY)


def error_of(server: Server, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        ask(server, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_replies_stand_in_the_order_of_the_conversations_and_are_heard_as_they_come(server: Server) -> None:
    def slow_at_first(body: dict) -> dict:
        time.sleep(0.2 if last_words(body) == "0" else 0)
        return completion("to " + last_words(body), tokens=7)

    server.answer = slow_at_first
    heard: list[int] = []
    tutor: Completer = Endpoint(server.base, "tutor", concurrency=4)
    replies = tutor.complete([says(str(i)) for i in range(12)], GREEDY, lambda i, reply: heard.append(i))
    assert [reply.text for reply in replies] == [f"to {i}" for i in range(12)]
    assert replies[3] == Reply("to 3", "", "to 3", "stop", 7)
    assert sorted(heard) == list(range(12)) and heard[0] != 0
    assert tutor.name == "tutor"


def test_no_more_requests_are_under_way_than_wanted(server: Server) -> None:
    server.answer = lambda body: time.sleep(0.02) or completion("x")  # type: ignore[func-returns-value]
    assert len(ask(server, 20, concurrency=3)) == 20
    assert 2 <= server.most_under_way <= 3


def test_nothing_to_ask_asks_nothing(server: Server) -> None:
    assert ask(server, 0) == []
    assert server.bodies == []


def test_sampling_parameters_become_the_fields_of_the_interface(server: Server) -> None:
    tutor = Endpoint(server.base, "tutor", extra={"chat_template_kwargs": {"thinking": True}})
    params = [
        SamplingParams(temperature=0.6, top_p=0.95, max_tokens=100, seed=5, stop=("END",), top_k=20, min_p=0.1),
        SamplingParams(stop_token_ids=(1,)),
    ]
    tutor.complete([says("0"), says("1")], params)
    first, second = sorted(server.bodies, key=last_words)
    extra = {"chat_template_kwargs": {"thinking": True}}
    assert first == {
        "model": "tutor", "messages": says("0"), "temperature": 0.6, "top_p": 0.95, "max_tokens": 100, "seed": 5,
        "stop": ["END"], "top_k": 20, "min_p": 0.1, **extra,
    }  # fmt: skip
    # What was not asked for is not sent: some servers refuse fields that they do not know.
    assert second == {"model": "tutor", "messages": says("1"), "temperature": 1.0, "top_p": 1.0, **extra}


@pytest.mark.parametrize(
    ("answer", "text", "reasoning", "content", "finish"),
    [
        (completion("4"), "4", "", "4", "stop"),
        (completion("4", "length"), "4", "", "4", "length"),
        (completion("4", None), "4", "", "4", "length"),
        (completion("4", "content_filter"), "4", "", "4", "length"),
        (completion("<think>\n2+2\n</think>\n\n4"), "<think>\n2+2\n</think>\n\n4", "2+2", "4", "stop"),
        # The template has opened the thought, so the server's text only closes it.
        (completion("2+2\n</think>\n\n4"), "<think>\n2+2\n</think>\n\n4", "2+2", "4", "stop"),
        (completion("4", reasoning_content="2+2\n"), "<think>\n2+2\n</think>\n\n4", "2+2", "4", "stop"),
        (completion("4", reasoning="2+2"), "<think>\n2+2\n</think>\n\n4", "2+2", "4", "stop"),
        (completion(None, "length", reasoning_content="2+"), "<think>\n2+", "2+", "", "length"),
        (completion("<think>\n2+", "length"), "<think>\n2+", "2+", "", "length"),
        (completion("", reasoning_content="hm"), "<think>\nhm\n</think>\n\n", "hm", "", "stop"),
        (completion([{"type": "text", "text": "4"}], reasoning_content=None), "4", "", "4", "stop"),  # type: ignore[arg-type]
    ],
)
def test_a_thought_is_found_wherever_the_server_puts_it(
    answer: dict, text: str, reasoning: str, content: str, finish: str
) -> None:
    assert parse_answer(answer) == Reply(text, reasoning, content, finish, 3)


words = st.text(st.sampled_from("ab \n."), max_size=30)


@given(words.filter(lambda t: t.strip("\n")), words)
def test_all_three_ways_to_send_a_thought_give_the_same_reply(thought: str, answer: str) -> None:
    inline = parse_answer(completion(f"<think>\n{thought}\n</think>\n\n{answer}"))
    assert parse_answer(completion(answer, reasoning_content=thought)).reasoning == inline.reasoning
    assert parse_answer(completion(answer, reasoning=thought)).content == inline.content
    opened = parse_answer(completion(f"{thought}\n</think>\n\n{answer}"))
    assert (opened.reasoning, opened.content) == (inline.reasoning, inline.content)


def test_a_server_that_does_not_count_tokens_is_understood() -> None:
    assert parse_answer(completion("4", tokens=None)).tokens == 0


@pytest.mark.parametrize(
    "trick",
    [
        openai_server.fails(500),
        openai_server.fails(503),
        openai_server.fails(429),
        openai_server.fails(408),
        openai_server.fails(409),
        openai_server.hangs_up,
        openai_server.breaks_off,
        openai_server.breaks_off_in_chunks,
        openai_server.babbles,
    ],
)
def test_what_passes_is_tried_again(server: Server, waits: list[float], trick: Callable) -> None:
    server.plan = [trick, trick, trick]
    assert [reply.text for reply in ask(server)] == ["to 0"]
    assert waits == [1.0, 2.0, 4.0]
    assert len(server.bodies) == 4 and server.bodies[0] == server.bodies[3]


@pytest.mark.parametrize("trick", [openai_server.sleeps(0.8), openai_server.drips(0.05)])
def test_an_answer_that_takes_too_long_is_asked_for_again(server: Server, waits: list[float], trick: Callable) -> None:
    server.plan = [trick]
    assert [reply.text for reply in ask(server, timeout=0.3)] == ["to 0"]
    assert waits == [1.0]


def test_the_delay_grows_to_a_minute_and_no_further(server: Server, waits: list[float]) -> None:
    server.plan = [openai_server.fails(500)] * 9
    ask(server, retries=9)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_server_that_says_when_to_come_back_is_obeyed(server: Server, waits: list[float]) -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    server.plan = [openai_server.fails(429, Retry_After="17"), openai_server.fails(503, Retry_After=date)]
    ask(server)
    assert waits[0] == 17.0 and 95 < waits[1] < 101
    server.plan = [openai_server.fails(429, "quota used up", Retry_After="86400")]
    message = error_of(server)
    assert "asks to come back in 86400 seconds" in message and "quota used up" in message


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_is_not_repeated(server: Server, status: int) -> None:
    server.plan = [openai_server.fails(status, "the prompt is\ntoo long")]
    assert f"refuses the request ({status} the prompt is too long)" in error_of(server)
    assert len(server.bodies) == 1


def test_one_refused_conversation_need_not_end_the_others(server: Server) -> None:
    def picky(handler: openai_server.Handler) -> None:
        openai_server.send(handler, 400, {"message": "too long"})

    server.plan = [picky]
    refused: list[tuple[int, str]] = []
    heard: list[int] = []
    tutor = Endpoint(server.base, "tutor", concurrency=1, on_refusal=lambda i, error: refused.append((i, str(error))))
    replies = tutor.complete([says("0"), says("1")], GREEDY, lambda i, reply: heard.append(i))
    assert [(i, "too long" in said) for i, said in refused] == [(0, True)]
    assert replies[0] == Reply("", "", "", "length", 0) and replies[1].text == "to 1"
    assert heard == [1]


def test_the_key_goes_to_the_server_and_into_no_message(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "sk-right"
    monkeypatch.setenv("TUTOR_KEY", "sk-right")
    assert ask(server, api_key_env="TUTOR_KEY")[0].text == "to 0"
    assert server.keys == ["Bearer sk-right"]
    monkeypatch.setenv("TUTOR_KEY", "sk-wrong")
    message = error_of(server, api_key_env="TUTOR_KEY")
    assert "401" in message and "is the key in TUTOR_KEY the right one?" in message
    assert "sk-wrong" not in message
    assert "name the environment variable that holds its key" in error_of(server)
    assert len(server.bodies) == 3
    assert "sk-right" not in repr(Endpoint(server.base, "tutor", "TUTOR_KEY"))


def test_a_key_that_is_not_there_is_said_before_anything_is_sent(server: Server) -> None:
    assert "environment variable NO_SUCH_KEY" in error_of(server, api_key_env="NO_SUCH_KEY")
    assert server.bodies == []


def test_the_key_does_not_follow_a_redirect(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTOR_KEY", "sk-secret")
    with openai_server.serving() as other:
        moved = {"Location": f"{other.base}/chat/completions"}
        server.plan = [lambda handler: openai_server.send(handler, 307, {}, **moved)]
        error_of(server, api_key_env="TUTOR_KEY")
        assert other.keys in ([], [None])


def test_a_model_that_is_not_there_is_answered_with_those_that_are(server: Server) -> None:
    server.models = ["deepseek-chat", "deepseek-reasoner"]
    message = error_of(server)
    assert message == f"{server.base} has no model 'tutor'; it has deepseek-chat, deepseek-reasoner"
    with pytest.raises(UserError, match="has no model 'tutor'; it has deepseek-chat"):
        Endpoint(server.base, "tutor").check()


def test_a_url_without_the_interface_is_recognised(server: Server) -> None:
    server.models = None
    with pytest.raises(UserError, match=r"other/chat/completions is not there \(404 Not Found\)"):
        Endpoint(server.base.replace("/v1", "/other"), "tutor").complete([says("0")], GREEDY)


@pytest.mark.parametrize("written", ["http://127.0.0.1:{}", "http://127.0.0.1:{}/v1/", "{}/chat/completions"])
def test_the_url_may_be_written_in_several_ways(server: Server, written: str) -> None:
    url = written.format(server.base if "chat" in written else server.port)
    assert Endpoint(url, "tutor").complete([says("0")], GREEDY)[0].text == "to 0"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "", "http://"])
def test_what_is_no_url_is_said_at_once(url: str) -> None:
    with pytest.raises(UserError, match="is no URL of a server"):
        Endpoint(url, "tutor")


def test_a_password_in_the_url_is_not_taken(server: Server) -> None:
    with pytest.raises(UserError, match="environment variable") as caught:
        Endpoint("https://me:hunter2@example.org/v1", "tutor")
    assert "hunter2" not in str(caught.value)


def test_nobody_listening_is_said_in_one_line(waits: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nobody = Endpoint(f"http://127.0.0.1:{port}", "tutor", retries=2)
    with pytest.raises(UserError, match=r"no answer after 3 tries \(connection refused\); is the server well\?"):
        nobody.complete([says("0")], GREEDY)
    assert waits == [1.0, 2.0]
    with pytest.raises(UserError, match=r"does not answer \(connection refused\); is the server running there\?"):
        nobody.check()


def test_checking_passes_where_all_is_well_or_the_server_has_no_list(server: Server) -> None:
    Endpoint(server.base, "tutor").check()
    server.models = None
    Endpoint(server.base, "tutor").check()
    assert server.bodies == []


def test_a_server_that_dies_for_good_costs_only_what_it_had_not_answered() -> None:
    running = openai_server.Server()
    heard: dict[int, Reply] = {}

    def hear(index: int, reply: Reply) -> None:
        heard[index] = reply
        if len(heard) == 5:
            running.close()

    tutor = Endpoint(running.base, "tutor", concurrency=2, retries=2)
    with pytest.raises(UserError, match="no answer after"):
        tutor.complete([says(str(i)) for i in range(40)], GREEDY, hear)
    assert 5 <= len(heard) < 40
    assert all(reply.text == f"to {i}" for i, reply in heard.items())


def test_a_server_that_comes_back_in_time_is_not_even_noticed() -> None:
    first = openai_server.Server()
    second: list[Server] = []

    def hear(index: int, reply: Reply) -> None:
        if not second:
            first.close()
            second.append(openai_server.Server(first.port))

    try:
        replies = Endpoint(first.base, "tutor", concurrency=2, retries=8).complete(
            [says(str(i)) for i in range(20)], GREEDY, hear
        )
    finally:
        second[0].close()
    assert [reply.text for reply in replies] == [f"to {i}" for i in range(20)]


def test_an_error_of_the_listener_ends_the_asking(server: Server) -> None:
    def hear(index: int, reply: Reply) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        Endpoint(server.base, "tutor", concurrency=1).complete([says(str(i)) for i in range(50)], GREEDY, hear)
    time.sleep(0.05)
    assert len(server.bodies) < 50


def test_an_answer_that_is_no_chat_completion_is_said(server: Server) -> None:
    server.answer = lambda body: {"object": "error"}
    assert "no choices[0].message" in error_of(server)
