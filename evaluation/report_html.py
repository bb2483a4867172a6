"""A report as one HTML file: no scripts, nothing from elsewhere, pictures inside."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from .report_blocks import Block, Code, Folded, Heading, Picture, Points, Table, Text

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #1f5fbf; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { white-space: nowrap; } tbody tr:hover { background: var(--soft); }
pre { background: var(--soft); padding: .6rem .8rem; overflow-x: auto; }
img { max-width: 100%; background: white; padding: .4rem; } summary { cursor: pointer; color: var(--accent); }
.pass { color: #1a7f37; font-weight: 600; } .fail { color: #cf222e; font-weight: 600; }
"""
COLOURED = ("pass", "fail")


def html(title: str, blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    """pictures: PNG by file name, for every Picture among the blocks."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{_blocks(blocks, pictures)}\n</body>\n</html>\n"
    )


def _blocks(blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    return "\n".join(_block(block, pictures) for block in blocks)


def _block(block: Block, pictures: Mapping[str, bytes]) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Points(texts):
            return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"
        case Table(head, rows):
            names = "".join(f"<th>{escape(text)}</th>" for text in head)
            lines = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
            return f'<div class="wide"><table><thead><tr>{names}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
        case Picture(file, text):
            data = base64.b64encode(pictures[file]).decode("ascii")
            return f'<p><img alt="{escape(text)}" src="data:image/png;base64,{data}"></p>'
        case Folded(title, inner):
            return f"<details><summary>{escape(title)}</summary>\n{_blocks(inner, pictures)}\n</details>"


def _cell(text: str) -> str:
    colour = f' class="{text}"' if text in COLOURED else ""
    return f"<td{colour}>{escape(text)}</td>"
