"""Every refusal in the source names what would help: in its own words, or where its words are made known.

A message is read as the source has it. A constant is looked up, a local name is all that its function binds it to, a
call is all that a function of the same file returns, a caught error of ours is what was raised where it was made.
Whatever stays unknown is no remedy.
"""

import ast
import builtins
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from qzo.errors import QzoError

ROOT = Path(__file__).parents[1]
OURS = ("qzo.", "bench.", "reports.")
VERBS = (
    "add|adopt|ask|attach|begin|call|change|check|choose|convert|copy|correct|cut|delete|download|fill|free|give|go|"
    "install|join|keep|leave|load|look|lower|make|mend|merge|move|name|open|pass|pip|put|qzo|quantize|quote|raise|read|"
    "release|remove|rename|replay|restore|resume|return|round|run|save|see|set|shorten|split|start|take|train|try|"
    r"update|use|wait|write|model\.save_pretrained"
)
IMPERATIVE = rf"(([;:?] |, or |\. |; or |\()(then |Then )?({VERBS}|--[a-z][-a-z]+)\b)"
RULE = r"\bmust\b|[;,] known are |\(known: "  # what a value that the user gave has to be
MADE_KNOWN = r"<(remedy|advice)>"  # a parameter of that name
HELPS = re.compile(f"{IMPERATIVE}|{MADE_KNOWN}|{RULE}")
HELPS_WITH_FILES = re.compile(f"{IMPERATIVE}|{MADE_KNOWN}")  # whose content the user did not write
FILES = ("qzo/checkpoints/", "qzo/formats/", "qzo/files/")
SEEN = "; see where it was made"
PASSED_ON = {"found.reason"}  # of an Inspection: the words of a refusal, which `obstacle` caught

# Of formats: what reads goes through Stored.empty, Stored.load, plan and table.find, what takes over through qzo.adopt
# and qzo.release, and these put a remedy behind what has none (`advised`; tests/qzo/checkpoints/test_remedies.py).
ADVISED = {
    *("codes", "dynamic", "families", "files", "foreign", "header", "keys", "layer", "library", "nesting", "packed"),
    *("places", "rope", "scheme", "schemes", "source", "state"),
}
# Why a published row is not predicted: `bench validate` lists it beside the others, and refuses nothing.
REASONS = "bench/validation/published/"


def is_ours(kind):
    return isinstance(kind, type) and issubclass(kind, ValueError) and kind.__module__.startswith(OURS)


def speaks(kind):
    """Whether an error of ours is made of its message, and not, as a simulated lack of memory, of numbers."""
    return is_ours(kind) and [*inspect.signature(kind.__init__).parameters][1] in ("message", "args")


class Source:
    """A file of the source, and what its names stand for."""

    def __init__(self, file):
        self.name = str(file.relative_to(ROOT))
        self.tree = ast.parse(file.read_text(encoding="utf-8"))
        self.module = import_module(self.name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        self.above = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self.helps = HELPS_WITH_FILES if self.name.startswith(FILES) else HELPS
        self.functions = {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)}

    def made(self):
        """(call, message) of each error of ours that is made here and gets no remedy from around it."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and node.args and speaks(self.known(node.func)) and not self.advised(node):
                yield node, node.args[0]

    def given(self, node, texts):
        """(function, number) of the parameter that messages end with, where a function returns the error of them."""
        function = next(self.around(node, ast.FunctionDef), None)
        if function is None or not isinstance(self.above[node], ast.Return):
            return None
        names = [argument.arg for argument in function.args.args if argument.arg != "self"]
        ends = {re.search(r"<(\w+)>$", text)[1] if re.search(r"<(\w+)>$", text) else None for text in texts}
        return (function.name, names.index(ends.pop())) if len(ends) == 1 and ends <= set(names) else None

    def calls(self, name, number):
        """(call, argument) of each call of a function by its name."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and name in (getattr(node.func, "id", ""), getattr(node.func, "attr", "")):
                yield node, node.args[number]

    def known(self, node):
        return getattr(self.module, node.id, vars(builtins).get(node.id)) if isinstance(node, ast.Name) else None

    def around(self, node, kind):
        """The nodes of a kind that a node is in, from the inside."""
        while (node := self.above.get(node)) is not None:
            if isinstance(node, kind):
                yield node

    def advised(self, node):
        """Whether a remedy is put behind it, by `with advised(...)` around it, or where it is caught around it."""
        calls = [item.context_expr for block in self.around(node, ast.With) for item in block.items]
        if any(isinstance(call, ast.Call) and getattr(call.func, "id", "") == "advised" for call in calls):
            return True
        within = [block for block in self.around(node, ast.Try) if any(node in ast.walk(part) for part in block.body)]
        return any(self.mends(handler) for block in within for handler in block.handlers)

    def mends(self, handler):
        """Whether a handler makes of each error of ours another one, that says what helps."""
        raised = handler.body[-1].exc if isinstance(handler.body[-1], ast.Raise) else None
        if handler.name is None or not isinstance(raised, ast.Call) or not is_ours(self.known(raised.func)):
            return False
        if not any(isinstance(kind, type) and issubclass(QzoError, kind) for kind in self.kinds(handler)):
            return False
        return all(self.helps.search(text.replace(SEEN, "")) for text in self.texts(raised.args[0], raised))

    def texts(self, node, at, depth=0):
        """All that a message may be."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            found = [""]
            for part in node.values:
                found = [text + more for text in found for more in self.texts(part, at, depth)][:99]
            return found
        if isinstance(node, ast.FormattedValue):
            return self.texts(node.value, at, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [one + two for one in self.texts(node.left, at, depth) for two in self.texts(node.right, at, depth)]
        if isinstance(node, ast.IfExp | ast.BoolOp):
            parts = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
            return [text for part in parts for text in self.texts(part, at, depth)]
        if isinstance(node, ast.Name) and depth < 4:
            found = self.named(node, at, depth)
        elif isinstance(node, ast.Call) and depth < 4:
            found = self.returned(node, at, depth)
        else:
            found = self.strings(self.known(node.value)) if isinstance(node, ast.Subscript) else []
        return found or [SEEN if ast.unparse(node) in PASSED_ON else f"<{ast.unparse(node)}>"]

    def named(self, node, at, depth):
        """What a name stands for: a caught error, what the function binds it to, or a constant."""
        if self.is_caught(node.id, at):
            return [SEEN]
        values, found = [], []
        for inner in (inner for function in self.around(at, ast.FunctionDef) for inner in ast.walk(function)):
            targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
            names = {name.id for to in targets if to is not None for name in ast.walk(to) if isinstance(name, ast.Name)}
            if node.id in names and isinstance(inner, ast.Assign | ast.NamedExpr):
                values.append(inner.value)
            elif node.id in names and isinstance(inner, ast.For):  # of TABLE.items()
                found += self.strings(self.known(getattr(getattr(inner.iter, "func", None), "value", None)))
        found += [text for value in values for text in self.texts(value, at, depth + 1)]
        constant = self.known(node)
        return found or ([constant] if isinstance(constant, str) else [])

    @staticmethod
    def strings(table):
        """The messages in a table of them by name, the last word of each entry."""
        if not isinstance(table, dict):
            return []
        last = [value[-1] if isinstance(value, tuple) else value for value in table.values()]
        return [f"; {text}" for text in last if isinstance(text, str)]

    def returned(self, call, at, depth):
        """What a function of this file returns; the text of a caught error."""
        if getattr(call.func, "id", "") == "str" and isinstance(call.args[0], ast.Name):
            return [SEEN] if self.is_caught(call.args[0].id, at) else []
        if getattr(call.func, "attr", "") in ("removeprefix", "removesuffix"):
            return self.texts(call.func.value, at, depth + 1)
        function = self.functions.get(getattr(call.func, "id", None) or getattr(call.func, "attr", ""))
        nodes = [] if function is None else list(ast.walk(function))
        values = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
        return [text for value in values for text in self.texts(value, value, depth + 1)]

    def is_caught(self, name, at):
        """Whether it is an error that is ours, whatever it is."""
        for handler in self.around(at, ast.ExceptHandler):
            if handler.name == name:
                return all(map(is_ours, self.kinds(handler)))
        return False

    def kinds(self, handler):
        """What a handler catches."""
        return [self.known(kind) for kind in getattr(handler.type, "elts", [handler.type])]


@pytest.mark.parametrize(("room", "fewest"), [("qzo", 500), ("bench", 150), ("reports", 12)])
def test_every_refusal_in_the_source_says_what_helps(room, fewest):
    sources = [Source(file) for file in sorted((ROOT / room).rglob("*.py"))]
    sources = [
        source
        for source in sources
        if not source.name.startswith(REASONS)
        and not (source.name.startswith("qzo/formats/") and Path(source.name).stem in ADVISED)
    ]
    messages = [(source, *made) for source in sources for made in source.made()]
    assert len(messages) >= fewest
    bare = []
    for source, call, message in messages:  # those that are given by a caller are looked at there, behind the others
        lacking = [text for text in source.texts(message, call) if not source.helps.search(text)]
        given = source.given(call, lacking) if lacking else None
        if given is not None:
            messages += [(caller, *found) for caller in sources for found in caller.calls(*given)]
        elif lacking:
            bare.append(f"{source.name}:{call.lineno}: {lacking[0]}")
    assert not bare, "\n".join(bare)


@pytest.mark.parametrize(
    ("text", "helps", "helps_with_files"),
    [
        ("in_features=100 is not divisible by group_size=64; choose 50, or pass pad=True", True, True),
        ("run.json cannot be read: no such file; restore it from a copy", True, True),
        ("<path>: no such layer; <remedy>", True, True),
        ("is it damaged? Then copy or download it again", True, True),
        ("--samples 0 must be at least 1", True, False),
        ("dtype=int3 is unknown; known are int4, int8", True, False),
        ("steps=0 is not positive", False, False),
        ("the header has 3 bytes; need 8", False, False),
        ("config.json and weights do not belong together, read or not", False, False),
        ("<path>: <error>", False, False),
    ],
)
def test_a_remedy_is_told_from_a_cause(text, helps, helps_with_files):
    assert bool(HELPS.search(text)) is helps and bool(HELPS_WITH_FILES.search(text)) is helps_with_files
