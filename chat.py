"""`dsv3 chat`: talk to a model in the terminal, or pipe messages through it, one a line.

In a terminal the reply streams, what the model thinks is dimmed, Ctrl-C stops a reply and Ctrl-D leaves. Where
standard input or output is not a terminal, every line is a message, as it stands (there are no commands); its reply is
printed as plain text, reasoning between `<think>` and `</think>`, and an error ends the run. With --verify, how many
replies agreed stands below the reply, dimmed; where output is no terminal, it goes to standard error.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from . import talk
from .conversation import Conversation, Piece, agreement, choose_format
from .core.encoding import stop_token
from .errors import UserError

MOST_REPLIES = 64
STOPPED = "Stopped."
HELP = """\
/reset         begin a new conversation; the system message stays
/system TEXT   set the system message; without TEXT, remove it
/exit          leave; Ctrl-D does too
/help          this list
Ctrl-C         stop the reply"""


def run(args: argparse.Namespace) -> None:
    talk.forgive_encodings()
    source = talk.open_source(args.model, args.revision)
    format = choose_format(source.tokenizer, source.config, args.format, args.thinking)
    params = talk.sampling(args, source, source.end_tokens(stop_token(format)))
    if not 1 <= args.verify <= MOST_REPLIES:
        raise UserError(f"--verify must be between 1 and {MOST_REPLIES}")
    if args.verify > 1 and params.temperature == 0:
        raise UserError("--verify: at --temperature 0 all replies are the same; leave one of them out")

    def conversation() -> Conversation:
        rollout = source.load(args, args.cache, args.speculative_tokens)
        return Conversation(rollout, source.tokenizer, format, params, args.thinking, args.system, args.verify)

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        answer_lines(conversation(), sys.stdin, sys.stdout)
        return
    console = Console(highlight=False)
    with console.status(f"loading {escape(args.model)}"):
        loaded = conversation()
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines and remembers them
    dim(console, f"{args.model}: format {format}, context of {loaded.context} tokens. /help lists the commands.")
    in_terminal(loaded, console, input)


def answer_lines(conversation: Conversation, lines: Iterable[str], out: TextIO) -> None:
    """Answer every line that is not blank."""
    for line in lines:
        message = line.rstrip("\r\n")
        if not message.strip():
            continue
        written, thinking = "", False
        for piece in conversation.ask(message):
            text = piece.text
            if piece.reasoning and not thinking:
                text = "<think>\n" + text
            elif thinking and not piece.reasoning:
                text = to_line_start(written) + "</think>\n\n" + text
            thinking = piece.reasoning
            written += text
            out.write(text)
            out.flush()
        out.write(to_line_start(written))
        out.flush()
        if conversation.verdict is not None:
            print(agreement(conversation.verdict), file=sys.stderr)


def to_line_start(written: str) -> str:
    """What brings the next text to the start of a line."""
    return "" if written.endswith("\n") else "\n"


def in_terminal(conversation: Conversation, console: Console, read: Callable[[str], str]) -> None:
    """Read messages and commands with `read(prompt)` and answer them until the user leaves."""
    while True:
        console.print()
        try:
            line = read("> ").strip()
        except KeyboardInterrupt:
            console.print()
            dim(console, "Ctrl-D or /exit leaves.")
            continue
        except EOFError:
            console.print()
            return
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        if command.startswith("/"):
            dim(console, obey(conversation, command, rest.strip()))
        elif line:
            answer(conversation, console, line)


def obey(conversation: Conversation, command: str, rest: str) -> str:
    """Carry out a command; what to say about it."""
    if command == "/help":
        return HELP
    if command == "/reset":
        conversation.messages.clear()
        return "A new conversation."
    if command == "/system":
        conversation.system = rest or None
        return "The system message is set." if rest else "There is no system message now."
    return f"There is no command {command}; /help lists them."


def answer(conversation: Conversation, console: Console, message: str) -> None:
    """Show the reply as it comes. Ctrl-C ends it; what is wrong with the message is one line."""
    thinking = fresh_line = False
    try:
        with closing(conversation.ask(message)) as pieces:
            for piece in _drawn(conversation, console, pieces):
                text = talk.harmless(piece.text)
                if thinking and not piece.reasoning:
                    console.print("\n" if fresh_line else "\n\n", end="")
                thinking = piece.reasoning
                fresh_line = text.endswith("\n")
                console.out(text, style="dim" if thinking else None, highlight=False, end="")
        end = ""
        if conversation.finish_reason == "length":
            end = "The reply was cut off: --max-tokens, or the context, was used up."
    except KeyboardInterrupt:
        end = STOPPED
    except UserError as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        return
    if not fresh_line:
        console.print()
    if conversation.verdict is not None and end != STOPPED:
        dim(console, agreement(conversation.verdict))
    if end:
        dim(console, end)


def _drawn(conversation: Conversation, console: Console, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces; where they come only after several replies, with a word while these are drawn."""
    if conversation.verify > 1:
        with console.status(f"drawing {conversation.verify} replies"):
            first = next(pieces, None)
        if first is not None:
            yield first
    yield from pieces


def dim(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False)
