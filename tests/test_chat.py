"""`dsv3 chat`: what it says to the model, what it shows, what it remembers, and what Ctrl-C does."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny_model import CONFIG, CONTEXT, GREEDY, TOKENIZER, ending_at, fails, load, prints, save

from dsv3 import backends, chat, cli
from dsv3.conversation import Conversation, choose_format
from dsv3.core import special_tokens as family
from dsv3.core.checkpoint import save_pretrained
from dsv3.core.encoding import encode_chat
from dsv3.core.generate import SamplingParams, SimpleRollout
from dsv3.core.tokenizer import Tokenizer
from dsv3.errors import UserError


@pytest.fixture(autouse=True)
def process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_active", None)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that chats in the format V3."""
    return save(tmp_path_factory.mktemp("models") / "tiny", "v3")


@pytest.fixture(scope="module")
def rollout(folder: Path) -> SimpleRollout:
    return load(folder)


# --- chat formats ---


@pytest.mark.parametrize("chat_format", ["v3", "r1", "v3.1"])
def test_the_format_is_the_one_that_was_saved_with_the_tokenizer(chat_format, tmp_path):
    TOKENIZER.save(tmp_path, chat_format)
    assert choose_format(Tokenizer.load(tmp_path), CONFIG, "auto", False) == chat_format


def test_a_format_that_cannot_think_is_not_asked_to():
    with pytest.raises(UserError, match="cannot think"):
        choose_format(TOKENIZER, CONFIG, "v3", True)
    assert choose_format(TOKENIZER, CONFIG, "v3.1", True) == "v3.1"


# --- a conversation ---


def by_hand(rollout: SimpleRollout, messages: list[dict[str, str]], params: SamplingParams = GREEDY) -> str:
    ids = TOKENIZER.encode_segments(encode_chat(messages, "v3"))
    tokens = rollout.generate([ids], params)[0].token_ids
    ended = tokens[-1] in (*params.stop_token_ids, *rollout.model.config.eos_token_ids)
    return TOKENIZER.decode(tokens[:-1] if ended else tokens, skip_special=True)


def test_lines_of_a_pipe_are_answered_in_turn_with_all_that_was_said(folder, rollout, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\n/reset\n"))
    out = prints(capsys, "chat", folder, "--system", "said", "--temperature", 0, "--max-tokens", 12)
    messages = [{"role": "system", "content": "said"}]
    wanted = ""
    for text in ("the cat", "/reset"):  # commands belong to the terminal; here a line is a message
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": by_hand(rollout, messages)})
        wanted += messages[-1]["content"].rstrip("\n") + "\n"
    assert out == wanted


def test_a_conversation_that_outgrows_the_context_ends_a_pipe_with_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("!" * CONTEXT + "\n"))
    assert f"the model's context has {CONTEXT}" in fails(capsys, "chat", folder)


@pytest.mark.parametrize("in_config", [True, False])
def test_a_reply_ends_with_the_end_of_sentence_which_does_not_show(in_config, tmp_path, monkeypatch, capsys):
    model, text = ending_at(TOKENIZER.encode_segments(encode_chat([{"role": "user", "content": "the cat"}], "v3")))
    config = CONFIG if in_config else CONFIG.replace(eos_token_id=None)
    save_pretrained(model, config, tmp_path / "model", also=TOKENIZER.save)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    out = prints(capsys, "chat", tmp_path / "model", "--temperature", 0)
    assert out.rstrip("\n") == text.rstrip("\n")


class Script:
    """A rollout that says what it is told to, token by token; an exception in the script is raised in its place."""

    def __init__(self, *replies: list):
        self.replies, self.prompts = iter(replies), []
        self.model = SimpleNamespace(config=CONFIG)

    def stream(self, prompts: list[list[int]], params: SamplingParams) -> Iterator[SimpleNamespace]:
        self.prompts += prompts
        reply = next(self.replies)
        for i, token in enumerate(reply):
            if isinstance(token, BaseException):
                raise token
            yield SimpleNamespace(token_id=token, finish_reason="stop" if i == len(reply) - 1 else None)


def tokens(text: str, *names: str) -> list[int]:
    return [*TOKENIZER.encode(text), *map(TOKENIZER.special_id, names)]


def terminal(script: Script, lines: list, chat_format: str = "v3") -> tuple[Conversation, str]:
    """Type `lines` (an exception is a key such as Ctrl-D) -> the conversation and what the screen shows."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    conversation = Conversation(script, TOKENIZER, chat_format, GREEDY)
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    chat.in_terminal(conversation, console, read)
    assert not list(typed)
    return conversation, console.file.getvalue()


def test_ctrl_c_stops_the_reply_and_the_conversation_goes_on_from_there():
    script = Script([*tokens("the cat"), KeyboardInterrupt(), *tokens(" sat")], tokens("mat", family.EOS))
    conversation, screen = terminal(script, ["hello", "and?", EOFError()])
    assert "the cat\nStopped.\n" in screen and "sat" not in screen
    said = [(message["role"], message["content"]) for message in conversation.messages]
    assert said == [("user", "hello"), ("assistant", "the cat"), ("user", "and?"), ("assistant", "mat")]
    assert script.prompts[1] == TOKENIZER.encode_segments(encode_chat(conversation.messages[:3], "v3"))


def test_ctrl_c_before_the_first_token_takes_the_message_back():
    conversation, screen = terminal(Script([KeyboardInterrupt()]), ["hello", EOFError()])
    assert "Stopped." in screen
    assert conversation.messages == []


def test_ctrl_c_at_the_prompt_does_not_leave():
    _, screen = terminal(Script(), [KeyboardInterrupt(), "/exit"])
    assert "Ctrl-D or /exit leaves." in screen


def test_commands_of_the_terminal():
    script = Script(*[tokens("cat", family.EOS)] * 2)
    lines = ["/help", "/system be kind", "one", "/reset", "two", "/nonsense", "/system", "/exit"]
    conversation, screen = terminal(script, lines)
    system = {"role": "system", "content": "be kind"}
    for text, prompt in zip(("one", "two"), script.prompts, strict=True):
        assert prompt == TOKENIZER.encode_segments(encode_chat([system, {"role": "user", "content": text}], "v3"))
    assert chat.HELP in screen
    assert "There is no command /nonsense" in screen
    assert conversation.system is None


def test_a_message_too_long_costs_one_line_and_not_the_conversation():
    conversation, screen = terminal(Script(tokens("cat", family.EOS)), ["!" * CONTEXT, "hi", EOFError()])
    assert f"the model's context has {CONTEXT}; shorten the message" in screen
    assert [message["content"] for message in conversation.messages] == ["hi", "cat"]


def test_what_an_r1_model_thinks_stands_apart_and_is_not_repeated_to_it():
    thought = [*tokens("hmm\n", family.END_THINK), *tokens("\n\nmat", family.EOS)]
    script = Script(thought, thought)
    _, screen = terminal(script, ["one", "two", EOFError()], "r1")
    assert "hmm\n\nmat\n" in screen
    assert "hmm" not in TOKENIZER.decode(script.prompts[1]) and "mat" in TOKENIZER.decode(script.prompts[1])
    out = io.StringIO()
    chat.answer_lines(Conversation(Script(thought), TOKENIZER, "r1", GREEDY), ["one"], out)
    assert out.getvalue() == "<think>\nhmm\n</think>\n\nmat\n"


def test_reasoning_is_told_apart_by_the_thinking_tokens_and_not_by_text():
    said = [*tokens("so </think> is\n", family.END_THINK), *tokens("\n\ncat\n", family.EOS)]
    conversation = Conversation(Script(said), TOKENIZER, "r1", GREEDY)
    pieces = list(conversation.ask("one"))
    assert "".join(piece.text for piece in pieces if piece.reasoning) == "so </think> is\n"
    assert "".join(piece.text for piece in pieces if not piece.reasoning) == "cat\n"
    message = {"role": "assistant", "content": "cat\n", "reasoning_content": "so </think> is\n"}
    assert conversation.messages == [{"role": "user", "content": "one"}, message]


# --- several replies, and a vote ---


class Drawn:
    """A rollout that gives the replies of one message in a script, token by token in turn. seeds: of what was drawn."""

    def __init__(self, *replies: list):
        self.replies, self.seeds = replies, []
        self.model = SimpleNamespace(config=CONFIG)

    def stream(self, prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[SimpleNamespace]:
        self.seeds += [one.seed for one in params]
        assert len(prompts) == len(self.replies)
        for place in range(max(map(len, self.replies))):
            for index, reply in enumerate(self.replies):
                if place < len(reply):
                    if isinstance(reply[place], BaseException):
                        raise reply[place]
                    finish = "stop" if place == len(reply) - 1 else None
                    yield SimpleNamespace(index=index, token_id=reply[place], finish_reason=finish)


def verified(*replies: list, chat_format: str = "v3") -> Conversation:
    return Conversation(Drawn(*replies), TOKENIZER, chat_format, GREEDY, verify=len(replies))


CAT, MAT = tokens("the cat", family.EOS), tokens("the mat", family.EOS)


def test_of_several_replies_the_one_of_the_majority_is_said_and_remembered(capsys):
    conversation, out = verified(CAT, MAT, MAT), io.StringIO()
    chat.answer_lines(conversation, ["which?"], out)
    assert out.getvalue() == "the mat\n"
    assert capsys.readouterr().err == "agreement 2 of 3\n"
    assert conversation.messages[-1] == {"role": "assistant", "content": "the mat"}
    first = conversation.rollout.seeds[0]
    assert conversation.rollout.seeds == [first, first + 1, first + 2] and conversation.finish_reason == "stop"


def test_votes_are_for_what_is_said_and_not_for_what_was_thought(capsys):
    def thought(about: str, answer: str) -> list[int]:
        return [*tokens(about, family.END_THINK), *tokens(answer, family.EOS)]

    out = io.StringIO()
    chat.answer_lines(
        verified(thought("a", "cat"), thought("b", "mat"), thought("c", "mat"), chat_format="r1"), ["?"], out
    )
    assert out.getvalue() == "<think>\nb\n</think>\n\nmat\n"
    assert capsys.readouterr().err == "agreement 2 of 3\n"


def test_replies_that_cannot_be_compared_leave_the_first(capsys):
    long = ["the cat sat on the mat " * 6, "a cat is a cat " * 9]
    out = io.StringIO()
    chat.answer_lines(verified(*(tokens(text, family.EOS) for text in long)), ["?"], out)
    assert out.getvalue() == long[0] + "\n"
    assert "no answer to compare in any of 2 replies" in capsys.readouterr().err


def in_a_terminal(conversation: Conversation) -> str:
    lines = iter(["which?"])
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    chat.in_terminal(conversation, console, read)
    return console.file.getvalue()


def test_the_terminal_shows_how_many_agreed_below_the_reply():
    assert "the mat\nagreement 2 of 3\n" in in_a_terminal(verified(CAT, MAT, MAT))


def test_ctrl_c_while_replies_are_drawn_takes_the_message_back():
    conversation = verified(CAT, [*tokens("the"), KeyboardInterrupt()])
    screen = in_a_terminal(conversation)
    assert "Stopped." in screen and "agreement" not in screen
    assert conversation.messages == []


def test_one_seed_gives_one_vote_and_its_winner_is_a_reply_of_that_seed(folder, monkeypatch, capsys):
    def said(*options: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
        argv = ("chat", folder, "--max-tokens", 4, "--temperature", 1, *options, "--backend", "cpu")
        assert cli.main([*map(str, argv)]) == 0
        return capsys.readouterr()

    voted = said("--seed", 7, "--verify", 3)
    assert voted == said("--seed", 7, "--verify", 3, "--speculative-tokens", 1)
    assert "of 3" in voted.err
    assert voted.out in [said("--seed", seed).out for seed in (7, 8, 9)]


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (("--verify", 0), "--verify must be between 1 and 64"),
        (("--verify", 3, "--temperature", 0), "at --temperature 0 all replies are the same"),
        (("--speculative-tokens", 9), "--speculative-tokens must be between 0 and 8"),
        (("--cache", "fp4"), "unknown TYPE 'fp4'; did you mean 'fp8'?"),
    ],
)
def test_options_that_cannot_be_are_one_line(options, wrong, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    assert wrong in fails(capsys, "chat", folder, *options)
