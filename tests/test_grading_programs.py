"""What tests may do with a program in the sandbox, and programs that read and print."""

import pytest

from dsv3.grading.sandbox import Outcome, Sandbox

# Tests that use the program's names. In each text, the program stands first.

FITS = {
    "names that are builtins": """
def sum(a, b): return a + b
---
assert sum(10, 15) == 25
""",
    "check, as HumanEval does": """
def g(x):
    return -x
---
def check(candidate):
    assert candidate(1) == -1

check(g)
""",
    "constants": """
LIMIT = 10 ** 400
---
assert LIMIT == 10 ** 400
""",
    "keywords and defaults": """
def f(a, *, b=2, **c): return a + b + c.get('d', 0)
---
assert f(1, b=3, d=4) == 8
assert f(1) == 3
""",
    "in-place changes": """
def f(a, b, c):
    a.sort()
    b['x'] = a
    c.add(1)
---
a, b, c = [[2], [1]], {}, set()
assert f(a, b, c) is None
assert a == [[1], [2]] and b == {'x': a} and c == {1}
""",
    "exceptions": """
class Own(KeyError): pass
def f(x):
    raise Own('no', x) if x else ValueError('yes')
---
try:
    f(0)
    assert False
except ValueError as e:
    assert str(e) == 'yes'
try:
    f(1)
    assert False
except Own as e:
    assert e.args == ('no', 1)
try:
    f(1)
    assert False
except LookupError:
    pass
""",
    "generators": """
def f(n):
    yield from range(n)
---
assert list(f(3)) == [0, 1, 2]
assert next(f(1)) == 0
assert 2 in f(5)
""",
    "map and zip": """
def f(x): return map(str, x)
---
assert tuple(f([1, 2])) == ('1', '2')
assert sorted(f([2, 1])) == ['1', '2']
""",
    "functions of the tests": """
def f(g, xs): return sorted(xs, key=g)
---
assert f(lambda x: -x, [1, 3, 2]) == [3, 2, 1]
assert f(len, ['aa', 'b']) == ['b', 'aa']
""",
    "functions that come back": """
def f(n): return lambda x: x + n
---
assert f(2)(3) == 5
""",
    "calls back and forth": """
def f(g, n): return n if n < 2 else g(n)
---
assert f(lambda n: f(lambda m: m, n - 1) + 1, 3) == 3
""",
    "iterators of the tests": """
def f(xs): return [next(xs), list(xs)]
---
assert f(iter([1, 2, 3])) == [1, [2, 3]]
""",
    "instances": """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
    def __repr__(self): return f'Stack({self.items})'
---
s = Stack()
s.push(3)
assert len(s) == 1 and s[0] == 3 and s.items == [3] and str(s) == 'Stack([3])'
assert isinstance(s, Stack) and not isinstance(3, Stack)
assert [*s] == [3] and bool(s)
""",
    "nodes": """
class Node:
    def __init__(self, x): self.x, self.left = x, None
def depth(n): return 1 + depth(n.left) if n else 0
---
root = Node(1)
root.left = Node(2)
assert depth(root) == 2 and root.left.x == 2 and depth(None) == 0
""",
    "copies": """
class Box:
    def __init__(self, x): self.x = x
---
import copy
a = Box([1])
b, c = copy.deepcopy(a), copy.copy(a)
c.x = 2
assert a.x == b.x == [1] and c.x == 2 and a != b
""",
    "pairs": """
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
def f(ps): return max(p.b for p in ps)
---
assert f([Pair(5, 24), Pair(15, 25)]) == 25
""",
    "operators between instances": """
class V:
    def __init__(self, x): self.x = x
    def __add__(self, o): return V(self.x + o.x)
    def __eq__(self, o): return self.x == o.x
    def __lt__(self, o): return self.x < o.x
    __hash__ = None
---
assert V(1) + V(2) == V(3) and V(1) < V(2) and V(1) != V(2) and max(V(1), V(3)).x == 3
""",
    "data classes and named tuples": """
from dataclasses import dataclass
from typing import NamedTuple
@dataclass
class A:
    x: int = 3
class B(NamedTuple):
    x: int
    y: int
---
assert A().x == 3 and A() == A(3)
assert B(1, 2) == (1, 2) and B(1, 2).y == 2
""",
    "with": """
from contextlib import contextmanager
@contextmanager
def f():
    yield 3
---
with f() as x:
    assert x == 3
""",
    "types of the standard library": """
from collections import *
from fractions import Fraction
from decimal import Decimal
import datetime
def f(): return Counter('aab'), deque([1]), Fraction(1, 3), Decimal('0.10'), datetime.date(2020, 1, 2)
---
from fractions import Fraction
from decimal import Decimal
from datetime import date
c, d, q, m, t = f()
assert c.most_common(1) == [('a', 2)] and list(d) == [1] and q == Fraction(1, 3)
assert m == Decimal('0.1') and t == date(2020, 1, 2) and t.year == 2020
""",
    "types as values": """
def f(x): return type(x)
---
assert f(1) is int and f(f) is not int
""",
    "the same object": """
x = object()
def f(): return x
---
assert f() is f() and f() == x
""",
    "asyncio": """
import asyncio
async def g():
    await asyncio.sleep(0)
    return 3
def f(): return asyncio.run(g())
---
assert f() == 3
""",
    "threads": """
from concurrent.futures import ThreadPoolExecutor as P
def f():
    with P(3) as p: return list(p.map(abs, [-1, -2]))
---
assert f() == [1, 2]
""",
    "deep recursion": """
import sys
sys.setrecursionlimit(20000)
def f(n): return n and 1 + f(n - 1)
---
assert f(5000) == 5000
""",
    "a thousand calls": """
def f(x): return x + 1
---
for i in range(1000):
    assert f(i) == i + 1
""",
    "__name__ is not __main__": """
if __name__ == '__main__': raise SystemExit
x = 1
---
assert x == 1
""",
    "randomness and time": """
import random, time, uuid, hashlib, re, json
def f(): return random.random() + time.time() + len(uuid.uuid4().hex)
---
assert f() > 32
""",
    "own helpers of the tests": """
def f(x): return helper(x)
def helper(x): return 2
---
def helper(x): return 3
assert f(1) == 2 and helper(1) == 3
""",
}


def test_tests_may_use_a_program_as_if_it_were_theirs(box: Sandbox):
    jobs = [tuple(text.split("\n---\n")) for text in FITS.values()]
    results = box.run_many(jobs, workers=2)
    assert {name: found for name, found in zip(FITS, results, strict=True) if found.outcome is not Outcome.PASSED} == {}


def test_the_reason_is_one_line_that_names_the_test(box: Sandbox):
    found = box.run("def f(x):\n    print('seen', x)\n    return 5", "assert f(1) == 5\n\nassert f(2) == 4, 'no'")
    assert found.outcome is Outcome.FAILED and found.output == "seen 1\nseen 2\n"
    assert found.why == "AssertionError: no (line 3 of the tests: assert f(2) == 4, 'no')"
    assert box.run("1 / 0", "pass").why == "ZeroDivisionError: division by zero"
    assert "NameError" in box.run("x = 1", "f(1)").why
    assert "the tests are no Python" in box.run("x = 1", "assert (").why


# Input and output.


@pytest.mark.parametrize(
    ("program", "stdin", "expected", "outcome"),
    [
        ("print(2 * int(input()))", "21\n", "42", Outcome.PASSED),
        ("import sys\nfor l in sys.stdin: print(l.strip(), ' ')", "a\nb", "a\nb\n\n", Outcome.PASSED),
        ("import sys\nprint(len(sys.stdin.buffer.read()))", "x" * 300_000, "300000", Outcome.PASSED),
        ("import os\nos.write(1, os.read(0, 9))", "ä", "ä", Outcome.PASSED),
        ("if __name__ == '__main__':\n    print(1)\n    exit()", "", "1", Outcome.PASSED),
        ("import sys\nprint(1)\nprint(2, file=sys.stderr)", "", "1", Outcome.PASSED),
        ("print(43)", "", "42", Outcome.FAILED),
        ("print(' 42')", "", "42", Outcome.FAILED),
        ("print(42)\n1 / 0", "", "42", Outcome.FAILED),
        ("print(42)\nexit(3)", "", "42", Outcome.FAILED),
        ("input()", "", "", Outcome.FAILED),
        ("print(42, flush=True)\nwhile True: pass", "", "42", Outcome.TIMEOUT),
        ("import os\nprint(42, flush=True)\nos.kill(os.getpid(), 9)\nos.abort()", "", "42", None),
    ],
)
def test_programs_that_read_and_print(box: Sandbox, program: str, stdin: str, expected: str, outcome: Outcome | None):
    found = Sandbox(0.8 if outcome is Outcome.TIMEOUT else 8.0, tier=box.tier).run(program, "", stdin, expected)
    assert found.outcome is outcome or (outcome is None and found.outcome is not Outcome.PASSED), found
