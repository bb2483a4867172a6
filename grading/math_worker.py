"""Symbolic comparison of two answers by math-verify. Runs in a worker process only: it may hang, and it may die.

math-verify asks whether two expressions have the same value, so it also accepts an answer that only restates the
question (`\\int_0^1 2x dx` for 1, `2+3` for 5, `x = x`). What is asked here in addition is that the answer has been
worked out: it may use arithmetic, elementary functions and containers, and any other operation only where the gold
answer uses it too.
"""

import logging
from collections.abc import Iterator
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Add, Basic, Eq, MatrixBase, Mul, Number, Pow, Symbol, nan, zoo
from sympy.core.function import UndefinedFunction

logging.disable(logging.CRITICAL)
FORMS = [LatexExtractionConfig(), ExprExtractionConfig()]

# Classes of SymPy an answer may always hold, besides numbers, symbols and constants.
ORDINARY = frozenset(
    [
        "Add",
        "Mul",
        "Pow",
        "exp",
        "log",
        "Abs",
        "conjugate",
        "re",
        "im",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "asin",
        "acos",
        "atan",
        "acot",
        "asec",
        "acsc",
        "sinh",
        "cosh",
        "tanh",
        "asinh",
        "acosh",
        "atanh",
        "Tuple",
        "FiniteSet",
        "Interval",
        "Union",
        "Intersection",
        "Complement",
        "ProductSet",
        "EmptySet",
        "Reals",
        "Integers",
        "Naturals",
        "Naturals0",
        "Rationals",
        "Complexes",
        "f",
        "And",
        "Or",
        "Not",
        "Equality",
        "Unequality",
        "StrictLessThan",
        "StrictGreaterThan",
        "LessThan",
        "GreaterThan",
        "Contains",
        "UnevaluatedExpr",
        "BooleanTrue",
        "BooleanFalse",
        "MutableDenseMatrix",
        "ImmutableDenseMatrix",
    ]
)
RELATIONS = frozenset({"Equality", "And", "Or"})
INEQUALITIES = frozenset({"And", "Or", "StrictLessThan", "StrictGreaterThan", "LessThan", "GreaterThan"})
CONTAINERS = frozenset({"Tuple", "FiniteSet", "Interval", "Union", "ProductSet"})


def grade(gold: str, answer: str | None) -> bool:
    """Whether `answer` is `gold`, worked out. Without an answer: whether `gold` can be understood. Both are LaTeX."""
    wanted = _parse(gold)
    if wanted is None or answer is None:
        return wanted is not None
    if "".join(gold.split()) == "".join(answer.split()):
        return True
    given = _parse(answer)
    if given is None:
        return False
    return worked_out(given, wanted) and verify(wanted, given, allow_set_relation_comp=True, timeout_seconds=None)


def _parse(text: str) -> Any:
    found = parse(f"\\boxed{{{text}}}", FORMS, fallback_mode="no_fallback", parsing_timeout=None)
    if not found or not isinstance(found[0], Basic | MatrixBase) or found[0].has(nan, zoo):
        return None
    return found[0]


def worked_out(answer: Any, gold: Any) -> bool:
    answer = _assigned(answer) if not RELATIONS & _operations(gold) else answer
    operations, known = _operations(answer), _operations(gold)
    if not operations <= ORDINARY | known or (RELATIONS & operations and not RELATIONS & known and not _is_set(gold)):
        return False
    if all(_literal(leaf) for leaf in _leaves(gold)):
        return all(_literal(leaf) for leaf in _leaves(answer))
    if isinstance(gold, Basic) and gold.is_number and gold.is_rational:
        # `2^{10}` for `2^{10}` or for `4^5`, but no sum for it.
        return _literal(answer) or operations <= known
    return not any(_plain_sum(node) for node in _nodes(answer)) or any(_plain_sum(node) for node in _nodes(gold))


def _assigned(answer: Any) -> Any:
    """What stands behind `x =`. `x = x + 1` and `2 = 2` assign nothing."""
    if not isinstance(answer, Eq) or answer.lhs in answer.rhs.free_symbols:
        return answer
    return answer.rhs if isinstance(answer.lhs, Symbol) or _named_function(answer.lhs) else answer


def _is_set(expression: Any) -> bool:
    return bool(getattr(expression, "is_set", False) or getattr(expression, "is_Set", False))


def _nodes(expression: Any) -> Iterator[Any]:
    """Every part of an expression, itself first. Matrices are no `Basic`, and nor are their rows."""
    yield expression
    parts: Any = expression.flat() if isinstance(expression, MatrixBase) else getattr(expression, "args", ())
    for part in parts:
        yield from _nodes(part)


def _operations(expression: Any) -> frozenset[str]:
    """Class names of all that is applied to something."""
    nodes = (node for node in _nodes(expression) if isinstance(node, MatrixBase) or getattr(node, "args", None))
    return frozenset("f" if _named_function(node) else type(node).__name__ for node in nodes)


def _named_function(expression: Any) -> bool:
    return isinstance(getattr(expression, "func", None), UndefinedFunction)


def _leaves(expression: Any) -> Iterator[Any]:
    """The elements of nested containers, the bounds of `a < x < b`; of anything else the expression itself."""
    if isinstance(expression, MatrixBase):
        for part in expression.flat():
            yield from _leaves(part)
    elif type(expression).__name__ in CONTAINERS:
        for part in expression.args:
            yield from _leaves(part)
    elif type(expression).__name__ in INEQUALITIES:
        for part in expression.args:
            if not isinstance(part, Symbol):
                yield from _leaves(part)
    else:
        yield expression


def _literal(expression: Any) -> bool:
    """A number as one writes it down: 3, -1/2, 10% (read by the parser as 10 * 1/100), or a bound of an interval."""
    if isinstance(expression, Number) or expression in (True, False):
        return True
    if isinstance(expression, Mul) and len(expression.args) == 2:
        left, right = expression.args
        inverse = isinstance(right, Pow) and isinstance(right.base, Number) and right.exp == -1
        return isinstance(left, Number) and (left == -1 or inverse or (isinstance(right, Number) and abs(right) < 1))
    return False


def _plain_sum(expression: Any) -> bool:
    """A sum of numbers that nobody has added up."""
    return isinstance(expression, Add) and sum(isinstance(part, Number) for part in expression.args) > 1


# The parser builds tables as it meets new forms. What the server has built before it forks is there in every child.
for _form in (
    r"\frac{\pi}{2} + 2\sqrt{3}x^2 - 6i",
    r"\left[0, \infty\right) \cup (-2, 1)",
    r"\{1, 2\}",
    "x = 2, 3",
    "a < 1/2",
    r"\begin{pmatrix} 1 & x \\ 0.5 & -1 \end{pmatrix}",
    r"1 \pm \sin y",
    r"|p| e^{2x}",
):
    grade(_form, _form)
