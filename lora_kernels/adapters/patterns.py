"""Regular expressions over module names, matched in bounded time.

Patterns come from files of strangers, and a backtracking matcher takes years for some of them.
NamePattern walks the parsed pattern once with the set of all places where a match may end, kept as
the bits of an integer: no backtracking.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from lora_kernels.adapters.config import AdapterError, short_repr

try:
    from re import _constants, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _constants
    import sre_parse as _parser

_MAX_PATTERN = 16_384
_IGNORECASE, _UNICODE = 2, 32
_FIRST_STEPS, _STEPS_PER_NAME = 100_000, 1_200
_STEPS_PER_PATTERN, _STEPS_PER_CHARACTER = 60, 3
_CLASS_PER_STEP = 8
"""What the patterns of one configuration may cost together: a tenth of a second, and a millisecond
for each name. Real ones take tens of steps, a list of module names one each."""

_CATEGORIES = {
    _constants.CATEGORY_DIGIT: str.isdecimal,
    _constants.CATEGORY_SPACE: str.isspace,
    _constants.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    _constants.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    _constants.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    _constants.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_CHARS = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN)
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
_ASSERTS = (_constants.ASSERT, _constants.ASSERT_NOT)
_OTHERS = (_constants.BRANCH, _constants.SUBPATTERN, _constants.AT)


class Budget:
    """The steps that are left for all patterns of one configuration."""

    def __init__(self) -> None:
        self._left = _FIRST_STEPS
        self._names: set[str] = set()

    def add_name(self, name: str) -> None:
        if name not in self._names:
            self._names.add(name)
            self._left += _STEPS_PER_NAME

    def spend(self, where: str, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise AdapterError(f"{where}: takes too long to match, with the other patterns of the configuration")


class NamePattern:
    """A regular expression over module names, matched in bounded time.

    Takes what `re` takes, but for backreferences, conditionals, atomic groups and inline flags
    other than (?i).

    Raises:
        AdapterError: the pattern is not valid, uses one of these, or costs too much, with the
            others of its `budget`; the message names `field`.
    """

    def __init__(self, pattern: str, field: str, budget: Budget | None = None) -> None:
        self.text = pattern
        self._budget = budget or Budget()
        self.where = f"{field}={short_repr(pattern)}"
        if len(pattern) > _MAX_PATTERN:
            raise AdapterError(f"{self.where}: a pattern may have {_MAX_PATTERN} characters, found {len(pattern)}")
        self._budget.spend(self.where, _STEPS_PER_PATTERN + _STEPS_PER_CHARACTER * len(pattern))
        try:
            parsed = _parser.parse(pattern)
            self._check_supported(parsed)
        except RecursionError as error:
            raise AdapterError(f"{self.where}: is nested too deeply") from error
        except (_parser.error, OverflowError) as error:
            raise AdapterError(f"{self.where}: is not a regular expression: {error}") from error
        if parsed.state.flags & ~(_IGNORECASE | _UNICODE):
            raise AdapterError(f"{self.where}: of the inline flags only (?i) is supported")
        self._parsed = parsed
        self._ignore_case = bool(parsed.state.flags & _IGNORECASE)
        self._pieces = self._literal_pieces()
        self._takes: dict[Any, dict[str, bool]] = {}
        """By node, the characters that it was asked for: a class may list thousands."""

    def _literal_pieces(self) -> list[tuple[int, str]]:
        """Of a pattern of literals and dots, as module names are: its pieces of literals, each with
        how far before the end it begins; of any other none."""
        chars = [
            chr(arg) if op is _constants.LITERAL else "." if op is _constants.ANY else None
            for op, arg in self._parsed
            if op is not _constants.AT
        ]
        if self._ignore_case or None in chars:
            return []
        pieces, start = [], 0
        for piece in "".join(map(str, chars)).split("."):
            pieces.append((len(chars) - start, piece))
            start += len(piece) + 1
        return pieces[::-1]

    def _cannot_end(self, name: str) -> bool:
        """Whether no match can end where `name` does; if False, one may."""
        size = len(name)
        return any(before > size or not name.startswith(piece, size - before) for before, piece in self._pieces)

    def fullmatch(self, name: str) -> bool:
        """Whether the pattern matches all of `name`."""
        return bool(self._end_mask(name, 1) >> len(name))

    def matches_end(self, name: str) -> bool:
        """Whether the pattern matches all of `name` or its end after a dot, as PEFT's rank_pattern
        does."""
        self._budget.add_name(name)
        self._budget.spend(self.where)
        return not self._cannot_end(name) and bool(self._end_mask(name, suffix_starts(name)) >> len(name))

    def match_ends(self, name: str, start: int) -> list[int]:
        """Every place in `name` where a match that begins at `start` can end."""
        found = self._end_mask(name, 1 << start)
        return [i for i in range(len(name) + 1) if found >> i & 1]

    def _end_mask(self, name: str, starts: int) -> int:
        self._name, self._chars = name, _char_positions(name)
        self._sets: dict[Any, int] = {}
        self._budget.add_name(name)
        self._budget.spend(self.where)
        try:
            return self._match_sequence(self._parsed, starts)
        except RecursionError as error:
            raise AdapterError(f"{self.where}: is nested too deeply") from error

    def _check_supported(self, items: Iterable[tuple[Any, Any]]) -> None:
        for op, arg in items:
            if op not in _CHARS + _REPEATS + _ASSERTS + _OTHERS or (op is _constants.SUBPATTERN and any(arg[1:3])):
                raise AdapterError(f"{self.where}: {str(op).lower()} is not supported")
            for inner in _children(op, arg):
                self._check_supported(inner)

    def _match_sequence(self, items: Iterable[tuple[Any, Any]], starts: int) -> int:
        for op, arg in items:
            if not starts:
                return 0
            starts = self._match_node(op, arg, starts)
        return starts

    def _match_node(self, op: Any, arg: Any, starts: int) -> int:
        self._budget.spend(self.where)
        if op in _CHARS:
            return (starts & self._accepted(op, arg)) << 1
        if op is _constants.SUBPATTERN:
            return self._match_sequence(arg[3], starts)
        if op is _constants.BRANCH:
            reached = 0
            for branch in arg[1]:
                reached |= self._match_sequence(branch, starts)
            return reached
        if op in _REPEATS:
            low, high, items = arg
            return self._match_repeat(low, high, items, starts)
        if op is _constants.AT:
            return starts & self._anchors(arg)
        return self._match_lookaround(arg[0], arg[1], op is _constants.ASSERT, starts)

    def _match_repeat(self, low: int, high: int, items: Any, starts: int) -> int:
        for _ in range(low):
            further = self._match_sequence(items, starts)
            if further == starts:
                break
            starts = further
        if high is _constants.MAXREPEAT and len(items) == 1 and items[0][0] in _CHARS:
            # a star over a set of characters: the carry of the sum runs through each stretch of
            # them
            accepted = self._accepted(*items[0])
            return ((starts & accepted) + accepted ^ accepted) | starts
        reached = starts
        for _ in range(min(high - low, len(self._name) + 1)):
            starts = self._match_sequence(items, starts) & ~reached
            if not starts:
                break
            reached |= starts
        return reached

    def _match_lookaround(self, direction: int, items: Any, wanted: bool, starts: int) -> int:
        everywhere = (2 << len(self._name)) - 1
        if direction < 0:
            found = self._match_sequence(items, everywhere)
        else:
            found = _bit_mask((starts >> i & 1) and self._match_sequence(items, 1 << i) for i in range(len(self._name) + 1))
        return starts & (found if wanted else everywhere & ~found)

    def _anchors(self, where: Any) -> int:
        size = len(self._name)
        if where in (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING):
            return 1
        if where in (_constants.AT_END, _constants.AT_END_STRING):
            return 1 << size
        word = [False, *map(_CATEGORIES[_constants.CATEGORY_WORD], self._name), False]
        wanted = where is _constants.AT_BOUNDARY
        return _bit_mask((word[i] != word[i + 1]) is wanted for i in range(size + 1))

    def _accepted(self, op: Any, arg: Any) -> int:
        """Where in the name there is a character that this node takes."""
        if op is _constants.LITERAL and not self._ignore_case:
            return self._chars.get(chr(arg), 0)
        key = (op, id(arg) if op is _constants.IN else arg)
        if key not in self._sets:
            known = self._takes.setdefault(key, {})
            for char in self._chars.keys() - known.keys():
                if op is _constants.IN:
                    self._budget.spend(self.where, len(arg) // _CLASS_PER_STEP)
                known[char] = self._accepts(op, arg, char)
            self._sets[key] = sum(at for char, at in self._chars.items() if known[char])
        return self._sets[key]

    def _accepts(self, op: Any, arg: Any, char: str) -> bool:
        if op is _constants.ANY:
            return char != "\n"
        cases = (char.lower(), char.upper()) if self._ignore_case else (char,)
        if op is _constants.IN:
            negated = arg[0][0] is _constants.NEGATE
            return negated is not any(_in_class(item, c) for item in arg[negated:] for c in cases)
        return (op is _constants.LITERAL) is any(ord(c) == arg for c in cases if len(c) == 1)


def _children(op: Any, arg: Any) -> Sequence[Any]:
    if op is _constants.SUBPATTERN:
        return (arg[3],)
    if op is _constants.BRANCH:
        return arg[1]
    if op in _REPEATS:
        return (arg[2],)
    return (arg[1],) if op in _ASSERTS else ()


def _in_class(item: tuple[Any, Any], char: str) -> bool:
    kind, value = item
    if kind is _constants.CATEGORY:
        return _CATEGORIES[value](char)
    low, high = value if kind is _constants.RANGE else (value, value)
    return len(char) == 1 and low <= ord(char) <= high


def _bit_mask(bits: Iterable[Any]) -> int:
    return sum(1 << i for i, bit in enumerate(bits) if bit)


def suffix_starts(name: str) -> int:
    """The places where a name or its end after a dot begins, as bits."""
    return 1 | _char_positions(name).get(".", 0) << 1


@lru_cache(maxsize=1024)
def _char_positions(name: str) -> dict[str, int]:
    places: dict[str, int] = {}
    for i, char in enumerate(name):
        places[char] = places.get(char, 0) | 1 << i
    return places
