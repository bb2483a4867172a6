"""Which shapes the tensors of an op have, as a declaration that can be checked in a few microseconds.

    shapes={"a": "T K", "sa": "T K/128", "b": "N K", "sb": "N/128 K/128"}

A word stands for a size, the same in the whole call; where the op has an integer argument of that name, it is that
number. Besides words there are:

    K/128        how many tiles or blocks cover K
    2*I  E+1     a multiple of a size, a size and some more; H*n and n+r of sizes that patterns before have named
    H?           a dimension that may be missing, in the whole call
    ...          any dimensions, the same in the whole call; at the beginning of a pattern

None fits every pattern. A list of tensors has a tuple of patterns, for its first ones; what follows is the backend's.
Where the argument `layout` is not "plain", a weight is packed and nothing is asked: the kernel that packed it knows
its shape alone.

A kernel reads memory by the sizes that it is told, and out of bounds where they are wrong: so an op's shapes are
checked before one runs (op.py). Operators of torch, and with them specifications, refuse by themselves.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Sizes = dict[str, Any]  # words -> sizes; "..." -> a tuple of them; None where the dimension is missing
Term = str | Callable[[Sizes, int], int]  # a word, or what computes the size from the known ones, given the one found

SYNTAX = re.compile(r"(\w+)(?:([*/+])(\w+))?")
MOST_KNOWN = 4096  # combinations of sizes that are kept per op
WORD = re.compile(r"\.\.\.|[A-Za-z_]\w*")


def _term(text: str) -> Term:
    found = SYNTAX.fullmatch(text)
    if found is None:
        raise ValueError(f"not a size: {text!r}")
    left, sign, right = found.groups()
    if sign is None:
        return left
    if sign == "/":
        step = int(right)
        return lambda sizes, size: -(-sizes[left] // step)
    if sign == "*" and left.isdigit():
        factor = int(left)
        return lambda sizes, size: sizes.setdefault(right, size // factor) * factor
    if sign == "+" and right.isdigit():
        more = int(right)
        return lambda sizes, size: sizes.setdefault(left, size - more) + more
    if sign == "*":
        return lambda sizes, size: sizes[left] * sizes[right]
    return lambda sizes, size: sizes[left] + sizes[right]


class Pattern:
    """The shape of one tensor."""

    def __init__(self, text: str):
        self.text = text
        words = text.split()
        self.open = words[:1] == ["..."]
        words = words[self.open :]
        self.optional = next((place for place, word in enumerate(words) if word.endswith("?")), None)
        self.terms = [_term(word.removesuffix("?")) for word in words]

    def fits(self, shape: Sequence[int], sizes: Sizes) -> bool:
        """Is `shape` of this pattern, with the sizes that are known? The ones that it names are known from then on."""
        terms = self.terms
        missing = len(terms) - len(shape)
        if missing:
            if self.open and missing < 0:
                if sizes.setdefault("...", shape[: -len(terms)]) != shape[: -len(terms)]:
                    return False
                shape = shape[-len(terms) :]
            elif missing == 1 and self.optional is not None:
                if sizes.setdefault(str(terms[self.optional]), None) is not None:
                    return False
                terms = [*terms[: self.optional], *terms[self.optional + 1 :]]
            else:
                return False
        elif self.open and sizes.setdefault("...", ()) != ():
            return False
        for size, term in zip(shape, terms, strict=True):
            if (sizes.setdefault(term, size) if isinstance(term, str) else term(sizes, size)) != size:
                return False
        return True

    def require(self, name: str, shape: Sequence[int], sizes: Sizes) -> None:
        before = dict(sizes)
        if not self.fits(shape, sizes):
            known = {word: before[word] for word in WORD.findall(self.text) if word in before}
            given = " with " + ", ".join(f"{word} = {size}" for word, size in known.items()) if known else ""
            raise ValueError(f"{name} is {list(shape)} and not [{', '.join(self.text.split())}]{given}")


class Shapes:
    """The patterns of an op's tensors; see the module's docstring."""

    def __init__(self, signature: inspect.Signature, patterns: Mapping[str, str | tuple[str, ...]]):
        self.signature = signature
        self.tensors = {
            name: Pattern(text) if isinstance(text, str) else tuple(map(Pattern, text))
            for name, text in patterns.items()
        }
        places = {name: place for place, name in enumerate(signature.parameters)}
        self._count, self._layout = len(places), places.get("layout")
        texts = [text for given in patterns.values() for text in ([given] if isinstance(given, str) else given)]
        words = {word for text in texts for word in WORD.findall(text)}
        self._integers = [places[name] for name in words & places.keys()]
        self._single = [places[name] for name, pattern in self.tensors.items() if isinstance(pattern, Pattern)]
        self._lists = [(places[name], len(some)) for name, some in self.tensors.items() if isinstance(some, tuple)]
        self._right: set[tuple[Any, ...]] = set()  # what has been found right before: a model's sizes are few

    def require(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """ValueError unless the tensors of a call have these shapes."""
        if kwargs or len(args) < self._count:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        if self._layout is not None and args[self._layout] != "plain":
            return
        key = tuple([None if (value := args[place]) is None else value.shape for place in self._single])
        if self._integers:
            key += tuple([args[place] for place in self._integers])
        for place, count in self._lists:
            key += tuple([tensor.shape for tensor in args[place][:count]])
        if key not in self._right:
            self._compare(dict(zip(self.signature.parameters, args, strict=True)))
            if len(self._right) == MOST_KNOWN:
                self._right.clear()
            self._right.add(key)

    def _compare(self, given: dict[str, Any]) -> None:
        sizes: Sizes = {name: value for name, value in given.items() if isinstance(value, int)}
        for name, pattern in self.tensors.items():
            value = given[name]
            if isinstance(pattern, tuple):
                if len(value) < len(pattern):
                    raise ValueError(f"{name} holds {len(value)} tensors and not {len(pattern)}")
                for index, one in enumerate(pattern):
                    one.require(f"{name}[{index}]", value[index].shape, sizes)
            elif value is not None:
                pattern.require(name, value.shape, sizes)
