"""The command line in a shell script, found by reading the script, not by running it.

Understood are assignments, arrays and what is appended to them, the usual expansions (``$X``, ``${X:-default}``,
``${A[@]}``, ``$((X*Y))``), and conditions that compare known text. A variable that the script does not set is empty; what
could not be decided is noted.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from planner.errors import Problem, SpecError
from planner.export.flags import parse_flags

__all__ = ["Command", "Script", "devices_of", "read_script"]

_NAME = r"[A-Za-z_]\w*"
_KEYWORD = re.compile(r"(?:export|readonly|local|declare|typeset)\s+(?:-\w+\s+)*")
_NAMED = re.compile(rf"({_NAME})(\+?)=")
_EXPANSION = re.compile(
    rf"\$\(\((?P<sum>(?:[^()]|\([^()]*\))*)\)\)|\$\{{(?P<name>{_NAME}|\d)(?P<array>\[[@*]\])?(?::?(?P<op>[-=?+])(?P<word>[^{{}}]*))?\}}"
    rf"|\$(?P<plain>{_NAME}|\d|[@*#])"
)
_SUM = re.compile(r"\$\(\((?:[^()]|\([^()]*\))*\)\)")
_SUBSTITUTION = re.compile(r"\$\((?!\()[^()]*\)|`[^`]*`")
_OPENERS = {"if": "fi", "for": "done", "while": "done", "case": "esac"}
_ORDER = {
    "-eq": operator.eq, "-ne": operator.ne, "-gt": operator.gt, "-ge": operator.ge, "-lt": operator.lt, "-le": operator.le,
}  # fmt: skip
_MAX_BYTES = 2**20
_MAX_DEPTH = 20


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its words after expansion, and the first line that it stands on."""

    words: tuple[str, ...]
    line: int


@dataclass(slots=True)
class Script:
    """What was read.

    Attributes:
        commands: simple commands, in order.
        variables: text of every variable at the end.
        directives: ``#SBATCH`` options, as words.
        notes: what could not be decided.
    """

    commands: list[Command] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    directives: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_script(text: str, where: str, variables: Mapping[str, str] | None = None) -> Script:
    """Commands of a shell script.

    Args:
        text: the script.
        where: the file that problems name.
        variables: what the environment sets; positional parameters by number.

    Raises:
        SpecError: the script is too long, or its quotes do not close.

    >>> script = read_script('TP=4\\nARGS=(\\n  --tp $TP  # ranks\\n)\\ntorchrun x.py ${ARGS[@]}', "x.sh")
    >>> script.commands[0].words
    ('torchrun', 'x.py', '--tp', '4')
    """
    if len(text) > _MAX_BYTES:
        raise SpecError(Problem(where, f"holds {len(text)} characters", "a launch script under a mebibyte"))
    script = Script(variables=dict(variables or {}))
    arrays: dict[str, list[str]] = {}
    skipping: list[bool] = []
    for number, statement in _statements(text, where):
        if statement.startswith("#SBATCH"):
            script.directives += shlex.split(statement.removeprefix("#SBATCH"), comments=True)
            continue
        if _branch(statement, script, arrays, skipping, number):
            continue
        if any(skipping):
            continue
        settings, statement = _settings(statement)
        if not statement:
            for name, more, value in settings:
                _assign(name, more, value, script.variables, arrays, where)
            continue
        words = _expand_words(statement, script.variables, arrays, where)
        if words:
            script.commands.append(Command(tuple(words), number))
    return script


def devices_of(script: Script, launch: Sequence[str], per_node: str = "") -> int | None:
    """Processes that a launch starts: nodes times processes per node, from its own options or the batch system's directives.

    Args:
        script: what was read.
        launch: words of the command before the training script.
        per_node: processes per node where neither says so; empty: not known.

    >>> devices_of(Script(), "torchrun --nnodes 4 --nproc_per_node=8".split())
    32
    """
    given = {
        key.replace("_", "-"): values for key, values in parse_flags([*launch, *script.directives]).items()
    }

    def number(*names: str) -> int | None:
        said = (given[name][0] for name in names if given.get(name))
        return next((int(word) for word in said if word.isdigit()), None)

    total = number("--num-processes")
    if total is not None:
        return total
    each = number("--nproc-per-node", "--num-gpus", "--gpus-per-node", "--ntasks-per-node")
    each = int(per_node) if each is None and per_node.isdigit() else each
    several = ("--nnodes", "--num-nodes", "--nodes")
    nodes = number(*several)
    if nodes is None and not given.keys() & several and each is not None:
        nodes = 1  # torchrun's default
    return nodes * each if nodes is not None and each is not None else None


# -- statements --------------------------------------------------------------------------------------------------------


def _statements(text: str, where: str) -> Iterator[tuple[int, str]]:
    """Logical lines: continuations joined, arrays and quotes that span lines kept whole, comments and here-documents dropped."""
    lines, position = text.splitlines(), 0
    while position < len(lines):
        start, statement = position, ""
        while True:
            line = lines[position] if position < len(lines) else ""
            if not statement and line.startswith("#SBATCH"):
                yield start + 1, line.strip()
                position += 1
                break
            continued = line.rstrip().endswith("\\")
            statement += _uncommented(line.rstrip()[:-1] if continued else line) + (
                " " if continued else "\n"
            )
            position += 1
            if position >= len(lines) or not (continued or _open(statement)):
                if _open(statement):
                    raise SpecError(
                        Problem(
                            f"{where}:{start + 1}", "a quote or parenthesis does not close", "a shell script"
                        )
                    )
                yield from ((start + 1, part) for part in _parts(statement.strip()))
                break
        ending = re.search(r"<<-?\s*['\"]?(\w+)['\"]?", statement)
        if ending:
            while position < len(lines) and lines[position].strip() != ending[1]:
                position += 1
            position += 1


def _uncommented(line: str) -> str:
    """The line without its comment; a # counts at the start of a word outside quotes."""
    quote = ""
    for index, char in enumerate(line):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "#" and (index == 0 or line[index - 1].isspace() or line[index - 1] in "(;"):
            return line[:index]
    return line


def _open(statement: str) -> bool:
    """Whether a quote, an array or a substitution is still open."""
    quote, depth, previous = "", 0, ""
    for char in statement:
        if quote:
            quote = "" if char == quote and previous != "\\" else quote
        elif char in "'\"" and previous != "\\":
            quote = char
        elif char == "(" and (previous in "=$(" or depth):
            depth += 1
        elif char == ")" and depth:
            depth -= 1
        previous = char
    return bool(quote) or depth > 0


def _parts(statement: str) -> Iterator[str]:
    """The commands of a line, cut at ; and && outside quotes and parentheses."""
    if statement.split(" ", 1)[0] in ("if", "elif"):  # a condition may hold && itself
        condition, _, rest = statement.partition(";")
        yield condition
        statement = rest.strip()
    part, quote, depth = "", "", 0
    tokens = re.split(r"(;;|;|&&|'|\"|\(|\)|\[\[|\]\])", statement)
    for token in tokens:
        if quote:
            quote = "" if token == quote else quote
        elif token in ("'", '"'):
            quote = token
        elif token in ("(", "[["):
            depth += 1
        elif token in (")", "]]"):
            depth = max(depth - 1, 0)
        elif token in (";", ";;", "&&") and not depth:
            if part.strip():
                yield part.strip()
            part = ""
            continue
        part += token
    if part.strip():
        yield part.strip()


# -- conditions --------------------------------------------------------------------------------------------------------


def _branch(
    statement: str, script: Script, arrays: dict[str, list[str]], skipping: list[bool], line: int
) -> bool:
    """Follows if, elif, else, fi; loops and cases are passed over. True when the statement was one of them."""
    first, _, rest = statement.partition(" ")
    first = first.strip()
    if first in ("then", "do") and rest:
        return _branch(rest.strip(), script, arrays, skipping, line)
    if first == "if":
        decided = False if any(skipping) else _holds(rest, script.variables, arrays)
        if decided is None:
            script.notes.append(f"line {line}: left out what depends on {rest.strip()}")
        skipping.append(decided is not True)
    elif first == "elif" and skipping:
        skipping[-1] = True if not skipping[-1] else _holds(rest, script.variables, arrays) is not True
    elif first == "else" and skipping:
        skipping[-1] = not skipping[-1]
    elif first in ("fi", "done", "esac") and skipping:
        skipping.pop()
    elif first in _OPENERS:
        script.notes.append(f"line {line}: left out a {first} block")
        skipping.append(True)
    elif first not in ("then", "do", "fi", "done", "esac"):
        return False
    return True


def _holds(condition: str, variables: Mapping[str, str], arrays: Mapping[str, list[str]]) -> bool | None:
    """Whether a condition holds; None where reading cannot tell."""
    results: list[bool | None] = []
    if "&&" in condition:
        return None
    for choice in condition.split("||"):
        inner = choice.strip().strip("[]").strip()
        try:
            words = [_expand(word, variables, arrays) for word in shlex.split(inner, posix=True)]
        except ValueError:
            return None
        results.append(_compare(words))
    if any(results):
        return True
    return None if None in results else False


def _compare(words: list[str]) -> bool | None:
    if len(words) == 2 and words[0] in ("-n", "-z"):
        return bool(words[1]) == (words[0] == "-n")
    if len(words) == 3 and words[1] in ("==", "=", "!="):
        return (words[0] == words[2]) == (words[1] != "!=")
    if len(words) == 3 and words[1] in _ORDER:
        if not all(re.fullmatch(r"-?\d+", word) for word in (words[0], words[2])):
            return None
        return bool(_ORDER[words[1]](int(words[0]), int(words[2])))
    return None


# -- expansion ---------------------------------------------------------------------------------------------------------


def _settings(statement: str) -> tuple[list[tuple[str, bool, str]], str]:
    """Assignments at the beginning of a statement (name, whether it is appended to, value), and the command after them.

    Those before a command are of its environment alone.

    >>> _settings('A="x y" B=(1 2) run --flag')
    ([('A', False, '"x y"'), ('B', False, '(1 2)')], 'run --flag')
    >>> _settings("export A=1 B")
    ([('A', False, '1')], '')
    """
    keyword = _KEYWORD.match(statement)
    rest = statement[keyword.end() :] if keyword else statement
    found = []
    while match := _NAMED.match(rest):
        end = _word_end(rest, match.end())
        found.append((match[1], bool(match[2]), rest[match.end() : end].strip()))
        rest = rest[end:].lstrip()
    return found, "" if keyword else rest


def _word_end(text: str, start: int) -> int:
    """Where a word ends: at a blank outside of quotes, parentheses and braces."""
    quote, depth = "", 0
    for index in range(start, len(text)):
        char = text[index]
        if text[index - 1] == "\\" and quote != "'":
            continue
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"`":
            quote = char
        elif char in "({":
            depth += 1
        elif char in ")}":
            depth -= 1
        elif char.isspace() and depth <= 0:
            return index
    return len(text)


def _assign(
    name: str, more: bool, value: str, variables: dict[str, str], arrays: dict[str, list[str]], where: str
) -> None:
    if value.startswith("(") and value.endswith(")"):
        words = _expand_words(value[1:-1], variables, arrays, where)
        arrays[name] = (arrays.get(name, []) if more else []) + words
        return
    text = " ".join(_expand_words(value, variables, arrays, where, split=False))
    variables[name] = variables.get(name, "") + text if more else text


def _expand_words(
    text: str, variables: Mapping[str, str], arrays: Mapping[str, list[str]], where: str, split: bool = True
) -> list[str]:
    """Words of a command or an array; an expansion outside quotes is split again, as the shell does."""
    # Blanks, pipes and redirections inside of sums and substitutions are no ends of words.
    text = _SUM.sub(lambda match: re.sub(r"\s+", "", match[0]), _SUBSTITUTION.sub("", text))
    lexer = shlex.shlex(text, posix=False, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        raw = _unredirected(list(lexer))
    except ValueError as error:
        raise SpecError(
            Problem(where, f"cannot be read ({error}): {text.strip()[:60]}", "a shell script")
        ) from None
    found: list[str] = []
    for word in raw:
        if word.startswith("'") and word.endswith("'"):
            found.append(word[1:-1])
            continue
        quoted = '"' in word
        array = re.fullmatch(rf'"?\$\{{({_NAME})\[@\]\}}"?', word)
        if array:
            elements = arrays.get(array[1], [])
            found += elements if quoted else [part for element in elements for part in element.split()]
            continue
        value = _expand(word.replace('"', "").replace("'", ""), variables, arrays)
        # "--flag value" is one element of an array, which an unquoted expansion splits later.
        found += [value] if (quoted or not split) and (value or not split) else value.split()
    return found


def _unredirected(words: list[str]) -> list[str]:
    """Words up to a pipe, without redirections.

    >>> _unredirected(["a.py", "--x", ">", "out", "2>&1", "|", "tee", "log"])
    ['a.py', '--x']
    """
    kept: list[str] = []
    skip = False
    for word in words:
        if word in ("|", "||", "|&", "&"):
            break
        target = re.fullmatch(r"(?:\d*|&)(?:>>?|<)(&?\S*)", word)
        if not target and not skip:
            kept.append(word)
        skip = target is not None and not target[1]
    return kept


def _expand(text: str, variables: Mapping[str, str], arrays: Mapping[str, list[str]], depth: int = 0) -> str:
    """Text with its variables replaced; a command substitution is empty."""
    if depth > _MAX_DEPTH:
        return ""

    def value(match: re.Match[str]) -> str:
        if match["sum"] is not None:
            return _sum(
                _expand(
                    re.sub(rf"(?<![$\w{{])({_NAME})", r"${\1}", match["sum"]), variables, arrays, depth + 1
                )
            )
        name = match["name"] or match["plain"]
        known = " ".join(arrays[name]) if name in arrays else variables.get(name, "")
        if match["op"] in ("-", "=") and not known:
            return _expand(match["word"], variables, arrays, depth + 1)
        if match["op"] == "+":
            return _expand(match["word"], variables, arrays, depth + 1) if known else ""
        return known

    inner = text
    for _ in range(_MAX_DEPTH):  # innermost braces first
        outer = _EXPANSION.sub(value, inner)
        if outer == inner:
            break
        inner = outer
    return _SUBSTITUTION.sub("", inner)


def _sum(text: str) -> str:
    """Whole-number arithmetic; empty where the text is something else."""
    operators = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.FloorDiv: operator.floordiv,
    }

    def evaluate(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return int(operators[type(node.op)](evaluate(node.left), evaluate(node.right)))
        raise ValueError(text)

    try:
        return str(evaluate(ast.parse(text.strip().replace("/", "//"), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return ""
