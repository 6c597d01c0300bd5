"""The shape of the package, checked on its syntax trees.

Each rule is a function from the sources to findings; `ALLOWED` holds the few exceptions with their
reasons, `PLANTED` one violation or more per rule, so that no rule is a test that cannot fail.
After a wanted change of the public API: python tests/test_architecture.py --write-api
"""

from __future__ import annotations

import ast
import builtins
import difflib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
API_FILE = ROOT / "tests" / "api.txt"

# A room imports from the rows above its own, and from itself. Neighbours do not know each other.
ROWS = (
    ("errors", "trees", "random", "files"),
    ("ops", "dist", "metrics", "profiler"),
    ("graph",),
    ("arch", "data"),
    ("loss", "opt", "peft", "meta", "retrieval", "autotuner"),
    ("checkpoint",),
    ("recipes", "report", "serve"),
    ("cli",),
    ("__main__",),
)
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_DEPTH = 2

# rule -> name as the finding gives it -> why this one may. An entry nothing needs is an error.
ALLOWED: dict[str, dict[str, str]] = {
    "imports_go_down": {
        "tessera.errors.StorageError": "files.py, a neighbour in row 0, is the one place that "
        "writes files, and says which could not be written",
    },
    # module -> the optional third party it is
    "imports_at_the_top": {
        "transformers": "a prefix of a transformers model is a cache of its own kind",
    },
    "no_kwargs": {
        "peft.Applied.__call__": "calls the user's model, whatever that takes",
        "arch.StackedModel.__call__": "calls the user's model, whatever that takes",
    },
    "few_parameters": {
        "meta.maml_step": "the inner loop's contract; all but two by keyword, each with a default",
        "meta.maml_tasks": "those of maml_step, and chunk",
        "meta.implicit_bilevel": "the contract's eleven, damping, and an outer loss of its own",
    },
    "short_files": {},
    "short_functions": {},
    "abstract_or_final": {},
    "dataclasses_by_keyword": {
        "arch.Anchor": "the guide writes Anchor(name, params, stats)",
    },
    "examples": {},
    "nothing_unpickled": {},
    "no_global_random": {
        "recipes.manual_seed": "a user's model and its dropout know no other generator; learn() "
        "sets it from (seed, step) inside fork_rng, so the caller's is put back",
    },
}

HEAVY = ("rich", "IPython", "sklearn", "river", "matplotlib", "pandas")
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# Built from parts, so that this file does not hold what it forbids.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:" + "|".join(("work", "root", "tmp")) + r")/")

DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
DRAWS_IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_"}
SEEDED_NUMPY = {"Generator", "default_rng", "SeedSequence", "PCG64", "Philox", "BitGenerator"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- what the rules look at ------------------------------------------------------------------


class Finding(NamedTuple):
    """One place that breaks a rule: `name` is the key under which ALLOWED could list it."""

    where: str
    name: str
    message: str


@dataclass(frozen=True)
class Source:
    """One file of the package and what is asked of it more than once."""

    path: str  # from the root of the repository, e.g. src/tessera/loss/ewc.py
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, self.path)

    @cached_property
    def module(self) -> str:
        """The dotted name, e.g. tessera.loss.ewc."""
        return self.path.removeprefix("src/").removesuffix(".py").replace("/", ".")

    @property
    def room(self) -> str:
        """The room's name; "" for the package's own `__init__`."""
        first = self.module.split(".")[1]
        return "" if first == "__init__" else first

    @property
    def is_face(self) -> bool:
        """Whether this file's `__all__` is what the room offers."""
        parts = self.module.split(".")
        return len(parts) == 2 or (len(parts) == 3 and parts[2] == "__init__")

    def at(self, node: ast.AST, name: str, message: str) -> Finding:
        """A finding at `node`."""
        return Finding(f"{self.path}:{getattr(node, 'lineno', 1)}", name, message)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Name in this file -> the dotted name it was imported as."""
        known = {}
        for node, dotted, bound in self.imports:
            first = dotted.split(".")[0]
            whole = isinstance(node, ast.ImportFrom) or bound != first
            known[bound] = dotted if whole else first
        return known

    @cached_property
    def imports(self) -> list[tuple[ast.AST, str, str]]:
        """(node, dotted name, name bound here) of every import, wherever it stands."""
        found: list[tuple[ast.AST, str, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for a in node.names:
                    found.append((node, a.name, a.asname or a.name.split(".")[0]))
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                found += [(node, f"{base}.{a.name}", a.asname or a.name) for a in node.names]
            elif isinstance(node, ast.Call) and _last(node.func) in ("import_module", "__import__"):
                for a in node.args[:1]:
                    if isinstance(a, ast.Constant):
                        found.append((node, str(a.value), ""))
        return found

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        here = self.module.split(".")[: -node.level]
        return ".".join([*here, node.module] if node.module else here)

    def dotted(self, node: ast.expr) -> str:
        """`np.random.rand` -> "numpy.random.rand"; "" for what is not a plain dotted name."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        return ""

    @cached_property
    def functions(self) -> list[tuple[str, Function]]:
        """(qualified name, node) of every function, methods and nested ones included."""
        return [(n, d) for n, d in self._definitions if not isinstance(d, ast.ClassDef)]

    @cached_property
    def classes(self) -> list[tuple[str, ast.ClassDef]]:
        """(qualified name, node) of every class."""
        return [(n, d) for n, d in self._definitions if isinstance(d, ast.ClassDef)]

    @cached_property
    def _definitions(self) -> list[tuple[str, Function | ast.ClassDef]]:
        found: list[tuple[str, Function | ast.ClassDef]] = []

        def visit(node: ast.AST, prefix: str) -> None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, Function | ast.ClassDef):
                    name = f"{prefix}{child.name}"
                    found.append((name, child))
                    # What a function defines inside is its own affair: "<locals>" is not public.
                    visit(child, f"{name}." if isinstance(child, ast.ClassDef) else f"{name}.<>.")
                else:
                    visit(child, prefix)

        visit(self.tree, "")
        return found

    @property
    def listed(self) -> list[str] | None:
        """`__all__`, or None where there is none."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and [_last(t) for t in node.targets] == ["__all__"]:
                return list(ast.literal_eval(node.value))
        return None

    def is_public(self, qualified: str) -> bool:
        """No part of module and name begins with an underscore (dunder methods are public)."""
        module = self.module.removesuffix(".__init__")
        parts = [p for p in f"{module}.{qualified}".split(".") if p not in ("__main__", "")]
        return not any(p == "<>" or (p[0] == "_" and not p.endswith("__")) for p in parts)


Sources = list[Source]
Rule = Callable[[Sources], Iterator[Finding]]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Enter a rule in RULES under its name."""
    RULES[function.__name__] = function
    return function


def sources_of(texts: Mapping[str, str]) -> Sources:
    """Sources from {path below src/tessera: text}."""
    return [Source(f"src/tessera/{path}", text) for path, text in texts.items()]


@cache
def package() -> Sources:
    """Every Python file of the package."""
    base = ROOT / "src" / "tessera"
    return sources_of(
        {p.relative_to(base).as_posix(): p.read_text("utf-8") for p in sorted(base.rglob("*.py"))}
    )


def _last(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript | ast.Call):
        return _last(node.value if isinstance(node, ast.Subscript) else node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _decorators(node: Function | ast.ClassDef) -> set[str]:
    return {_last(d) for d in node.decorator_list}


def _keywords(call: ast.Call) -> dict[str | None, object]:
    return {
        k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in call.keywords
    }


# --- imports ---------------------------------------------------------------------------------


@rule
def rooms_in_the_table(sources: Sources) -> Iterator[Finding]:
    """Every file and folder directly below the package is a room of the table."""
    for s in sources:
        if s.room and s.room not in ROW:
            yield s.at(
                s.tree,
                s.room,
                f"{s.room!r} is not in ROWS: put the file in a room that is, or give it a row",
            )


@rule
def imports_go_down(sources: Sources) -> Iterator[Finding]:
    """A room imports from the rows above its own, TYPE_CHECKING or not."""
    for s in sources:
        for node, dotted, _ in s.imports:
            parts = dotted.split(".")
            if parts[0] != "tessera" or not s.room:
                continue
            target = parts[1] if len(parts) > 1 else ""
            if target == s.room:
                continue
            if target not in ROW:
                advice = "import the room it lives in, not the package itself"
            elif ROW[target] < ROW.get(s.room, 0):
                continue
            else:
                advice = "pass the value in as an argument, or move the shared part to a lower row"
            known = f"row {ROW[target]}" if target in ROW else "no room"
            mine = f"row {ROW.get(s.room)}"
            yield s.at(node, dotted, f"{s.room} ({mine}) imports {dotted} ({known}): {advice}")


@rule
def no_star_imports(sources: Sources) -> Iterator[Finding]:
    """Names are imported one by one."""
    for s in sources:
        for node, dotted, bound in s.imports:
            if bound == "*":
                yield s.at(node, dotted, f"{dotted}: name what is imported")


@rule
def imports_at_the_top(sources: Sources) -> Iterator[Finding]:
    """Imports stand at module level; optional third parties may wait inside a function."""
    for s in sources:
        inside = {id(n) for _, function in s.functions for n in ast.walk(function)}
        for node, dotted, _ in s.imports:
            if id(node) in inside and not isinstance(node, ast.Call):
                name = dotted.split(".")[0]
                yield s.at(
                    node,
                    name,
                    f"{dotted} is imported inside a function: move it to the top (a cycle says "
                    "something lives in the wrong room); only an optional third party may stay",
                )


# --- functions -------------------------------------------------------------------------------

SIGNATURES = ("__init__", "__new__", "__call__")


def _public_functions(sources: Sources) -> Iterator[tuple[Source, str, Function]]:
    for s in sources:
        for name, node in s.functions:
            last = name.split(".")[-1]
            if s.is_public(name) and (last in SIGNATURES or not last.startswith("__")):
                yield s, name, node


@rule
def no_kwargs(sources: Sources) -> Iterator[Finding]:
    """Public functions name their arguments, so that a typo is an error."""
    for s, name, node in _public_functions(sources):
        if node.args.kwarg:
            yield s.at(
                node,
                f"{s.room}.{name}",
                f"{name} takes **{node.args.kwarg.arg}: name the arguments",
            )


@rule
def few_parameters(sources: Sources) -> Iterator[Finding]:
    """A public function has at most MAX_PARAMETERS parameters, self not counted."""
    for s, name, node in _public_functions(sources):
        a = node.args
        names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"])) + bool(a.vararg)
        if count > MAX_PARAMETERS:
            yield s.at(
                node,
                f"{s.room}.{name}",
                f"{name} has {count} parameters, at most {MAX_PARAMETERS}: "
                "make two functions, or pass a value that groups them",
            )


@rule
def short_files(sources: Sources) -> Iterator[Finding]:
    """A file has at most MAX_FILE_LINES lines."""
    for s in sources:
        lines = len(s.text.splitlines())
        if lines > MAX_FILE_LINES:
            yield Finding(
                f"{s.path}:{lines}",
                s.path,
                f"{lines} lines, at most {MAX_FILE_LINES}: split it by the noun it is about",
            )


@rule
def short_functions(sources: Sources) -> Iterator[Finding]:
    """A function has at most MAX_FUNCTION_LINES lines of code."""
    for s in sources:
        lines = s.text.splitlines()
        for name, node in s.functions:
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            skip = set(range(first.lineno, (first.end_lineno or 0) + 1)) if documented else set()
            numbers = set(range(node.lineno, (node.end_lineno or 0) + 1)) - skip
            code = [n for n in numbers if (t := lines[n - 1].strip()) and not t.startswith("#")]
            if len(code) > MAX_FUNCTION_LINES:
                yield s.at(
                    node,
                    f"{s.room}.{name}",
                    f"{name} has {len(code)} lines of code, at most {MAX_FUNCTION_LINES}: "
                    "give a step of it a name",
                )


# --- classes ---------------------------------------------------------------------------------

ABSTRACT = {"ABC", "Protocol", "ABCMeta"}
BUILTIN_ERRORS = {
    n for n, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, BaseException)
}


class Kind(NamedTuple):
    """A class of the package, with the classes of the package it derives from."""

    source: Source
    node: ast.ClassDef
    name: str
    bases: list[Kind]

    @property
    def depth(self) -> int:
        """How many classes of the package stand above it."""
        return max((1 + b.depth for b in self.bases), default=0)

    @property
    def is_error(self) -> bool:
        """Whether it is an exception."""
        return any(_last(b) in BUILTIN_ERRORS for b in self.node.bases) or any(
            b.is_error for b in self.bases
        )

    @property
    def is_abstract(self) -> bool:
        """Whether it says so: ABC, Protocol, or an abstract method."""
        marks = {_last(b) for b in self.node.bases} | {_last(k.value) for k in self.node.keywords}
        methods = [n for n in self.node.body if isinstance(n, Function)]
        return bool(marks & ABSTRACT) or any("abstractmethod" in _decorators(m) for m in methods)


def _kinds(sources: Sources) -> list[Kind]:
    places = {(s.room, n.split(".")[-1]): (s, n, node) for s in sources for n, node in s.classes}
    made: dict[int, Kind] = {}

    def find(s: Source, base: ast.expr) -> Kind | None:
        target = base.value if isinstance(base, ast.Subscript) else base
        dotted = s.dotted(target).split(".")
        if len(dotted) == 1:  # defined in this file
            own = [(s, n, node) for n, node in s.classes if n.split(".")[-1] == dotted[0]]
            return make(*own[0]) if own else None
        place = places.get((dotted[1], dotted[-1])) if dotted[0] == "tessera" else None
        return make(*place) if place else None

    def make(s: Source, name: str, node: ast.ClassDef) -> Kind:
        if id(node) not in made:
            bases = [k for k in (find(s, b) for b in node.bases) if k]
            made[id(node)] = Kind(s, node, name, bases)
        return made[id(node)]

    return [make(s, name, node) for s in sources for name, node in s.classes]


@rule
def abstract_or_final(sources: Sources) -> Iterator[Finding]:
    """A class of the package is an interface or is never subclassed; errors are a tree."""
    for kind in _kinds(sources):
        for base in kind.bases:
            if not base.is_abstract and not base.is_error:
                yield kind.source.at(
                    kind.node,
                    f"{kind.source.room}.{kind.name}",
                    f"{kind.name} derives from {base.name}, which is concrete: "
                    "hold one and call it, or make the base an ABC or a Protocol",
                )


@rule
def shallow_classes(sources: Sources) -> Iterator[Finding]:
    """At most MAX_DEPTH classes of the package stand above a class."""
    for kind in _kinds(sources):
        if kind.depth > MAX_DEPTH:
            yield kind.source.at(
                kind.node,
                f"{kind.source.room}.{kind.name}",
                f"{kind.name} is {kind.depth} classes deep, at most {MAX_DEPTH}: "
                "compose instead of deriving",
            )


@rule
def no_mixins(sources: Sources) -> Iterator[Finding]:
    """A class derives from at most one class of the package."""
    for kind in _kinds(sources):
        if len(kind.bases) > 1:
            names = ", ".join(b.name for b in kind.bases)
            yield kind.source.at(
                kind.node,
                f"{kind.source.room}.{kind.name}",
                f"{kind.name} derives from {names}: keep one, hold the others as fields",
            )


def _dataclasses(sources: Sources) -> Iterator[tuple[Source, str, ast.ClassDef, dict]]:
    for s in sources:
        for name, node in s.classes:
            for d in node.decorator_list:
                if _last(d) == "dataclass":
                    yield s, name, node, _keywords(d) if isinstance(d, ast.Call) else {}


@rule
def dataclasses_are_values(sources: Sources) -> Iterator[Finding]:
    """Frozen, with slots, and without a generated `==` (it would compare tensors)."""
    for s, name, node, given in _dataclasses(sources):
        missing = [
            f"{k}={v}"
            for k, v in {"frozen": True, "slots": True, "eq": False}.items()
            if given.get(k) is not v
        ]
        if missing:
            yield s.at(node, f"{s.room}.{name}", f"{name}: write {', '.join(missing)} too")


@rule
def dataclasses_by_keyword(sources: Sources) -> Iterator[Finding]:
    """Public values are made by keyword."""
    for s, name, node, given in _dataclasses(sources):
        if s.is_public(name) and given.get("kw_only") is not True:
            yield s.at(node, f"{s.room}.{name}", f"{name}: write kw_only=True too")


# --- documentation ---------------------------------------------------------------------------


@rule
def documented(sources: Sources) -> Iterator[Finding]:
    """Every public module, class, function and method says what it is."""
    for s in sources:
        if s.is_public("") and not ast.get_docstring(s.tree):
            yield s.at(s.tree, s.module, "the module has no docstring: one line on what lives here")
        public = [(n, d) for n, d in (*s.classes, *s.functions) if s.is_public(n)]
        for name, node in public:
            last, marks = name.split(".")[-1], _decorators(node)
            if last.startswith("__") or marks & {"overload", "setter", "override"}:
                continue
            if not ast.get_docstring(node):
                yield s.at(node, f"{s.room}.{name}", f"{name} has no docstring")


@rule
def examples(sources: Sources) -> Iterator[Finding]:
    """Every function and class a room offers has an `Example:` that runs as a doctest."""
    errors = {id(k.node) for k in _kinds(sources) if k.is_error}  # one sentence each is enough
    for face in sources:
        if not face.is_face or not face.room:
            continue
        for offered in face.listed or ():
            home, name = _home(sources, face, offered)
            for qualified, node in (*home.classes, *home.functions):
                text = ast.get_docstring(node) or ""
                runs = ">>>" in text.partition("Example:")[2]
                spared = id(node) in errors or "overload" in _decorators(node)
                if qualified == name and not spared and not runs:
                    yield home.at(
                        node,
                        f"{face.room}.{offered}",
                        f"{face.room}.{offered} has no doctest under `Example:`: "
                        "show the smallest call and what it gives",
                    )


def _home(sources: Sources, face: Source, offered: str) -> tuple[Source, str]:
    """The file that defines what `face` offers under this name, and its name there."""
    dotted = face.aliases.get(offered, "")
    module, _, name = dotted.rpartition(".")
    for s in sources:
        if module and s.module.removesuffix(".__init__") == module and s is not face:
            return (s, name) if name not in s.aliases else _home(sources, s, name)
    return face, offered


@rule
def rooms_list_what_they_offer(sources: Sources) -> Iterator[Finding]:
    """`__all__` of a room is exactly what its `__init__` (or its one file) binds in public."""
    for s in sources:
        if not s.is_face or not s.room or s.room == "__main__":
            continue
        defined = {n for n, _ in (*s.classes, *s.functions) if "." not in n}
        if s.path.endswith("__init__.py"):
            defined |= {b for _, d, b in s.imports if not d.startswith("__future__.")}
        offered = {n for n in defined if n and not n.startswith("_")}
        listed = set(s.listed or ())
        constants = {_last(t) for n in s.tree.body if isinstance(n, ast.Assign) for t in n.targets}
        constants |= {_last(n.target) for n in s.tree.body if isinstance(n, ast.AnnAssign)}
        for name in sorted(offered - listed):
            yield s.at(s.tree, name, f"{name} is missing from __all__: list it, or underscore it")
        for name in sorted(listed - offered - constants):
            yield s.at(s.tree, name, f"__all__ lists {name}, which is not there")


# --- safety ----------------------------------------------------------------------------------


@rule
def nothing_unpickled(sources: Sources) -> Iterator[Finding]:
    """No file a user hands over can run code: no pickle in any form, no eval, no exec."""
    for s in sources:
        for node, dotted, _ in s.imports:
            if dotted.split(".")[0] in PICKLES:
                yield s.at(node, f"{s.room}.{dotted}", f"{dotted}: safetensors and JSON instead")
        for node in ast.walk(s.tree):
            if not isinstance(node, ast.Call):
                continue
            called, given = s.dotted(node.func), _keywords(node)
            name = f"{s.room}.{called}"
            if called in ("eval", "exec", "builtins.eval", "builtins.exec"):
                yield s.at(node, name, f"{called}() runs what it is given: parse it instead")
            elif called.startswith("torch.") and called.endswith(".load"):
                yield s.at(node, name, f"{called} can unpickle: use safetensors")
            elif called == "numpy.load" and given.get("allow_pickle") is not False:
                yield s.at(node, name, "numpy.load without allow_pickle=False")
            elif given.get("allow_pickle", False) is not False:
                yield s.at(node, name, f"{called}(allow_pickle=...): leave it out or False")


@rule
def no_global_random(sources: Sources) -> Iterator[Finding]:
    """Every draw names its generator, so that a resume or a replay needs no bookkeeping."""
    for s in sources:
        for node, dotted, _ in s.imports:
            if dotted.split(".")[0] == "random":
                yield s.at(node, f"{s.room}.random", "use tessera.random, not the stdlib's")
        for node in ast.walk(s.tree):
            if not isinstance(node, ast.Call):
                continue
            called, named = s.dotted(node.func), "generator" in _keywords(node)
            module, _, last = called.rpartition(".")
            last = last or _last(node.func)
            moves = (
                called in ("torch.manual_seed", "torch.seed", "torch.random.manual_seed")
                or called == "torch.default_generator.manual_seed"
                or (module == "torch" and last in DRAWS and not named)
                or (isinstance(node.func, ast.Attribute) and last in DRAWS_IN_PLACE and not named)
                or (module == "numpy.random" and last not in SEEDED_NUMPY)
            )
            if moves:
                yield s.at(
                    node,
                    f"{s.room}.{last}",
                    f"{called or last}() draws from the process-wide generator: "
                    "pass generator=tessera.random.generator(seed, ...)",
                )


# --- the rules, run --------------------------------------------------------------------------


def report(name: str, findings: list[Finding]) -> str:
    """The failure text: the rule, then one line a finding."""
    about = (RULES[name].__doc__ or "").strip()
    lines = [f"{f.where}: [{name}] {f.message}" for f in findings]
    return "\n".join([f"{name}: {about}", *lines])


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    allowed = ALLOWED.get(name, {})
    broken = [f for f in RULES[name](package()) if f.name not in allowed]
    if broken:
        pytest.fail(report(name, broken), pytrace=False)


@pytest.mark.parametrize("name", ALLOWED)
def test_every_exception_is_needed_and_has_a_reason(name: str) -> None:
    found = {f.name for f in RULES[name](package())}
    stale = sorted(set(ALLOWED[name]) - found)
    assert not stale, f"ALLOWED[{name!r}] no longer needs {stale}: delete them"
    assert all(ALLOWED[name].values()), f"ALLOWED[{name!r}] has an entry without a reason"


def api(sources: Sources) -> str:
    """The public API, a sorted line each: `room.name`, and `tessera.name` for the top level."""
    faces = [s for s in sources if s.is_face]
    lines = {f"{s.room or 'tessera'}.{name}" for s in faces for name in s.listed or ()}
    return "".join(f"{line}\n" for line in sorted(lines))


def test_the_public_api_is_the_checked_in_list() -> None:
    was = API_FILE.read_text("utf-8").splitlines() if API_FILE.exists() else []
    now = api(package()).splitlines()
    diff = list(difflib.unified_diff(was, now, "api.txt", "code", n=0, lineterm=""))
    if diff:
        about = "the public API changed; if that is wanted, review the lines below and run"
        command = "    python tests/test_architecture.py --write-api"
        pytest.fail("\n".join([about, command, *diff]), pytrace=False)


def machine_paths(texts: Mapping[str, str]) -> list[str]:
    """file:line of every path that exists on one machine only."""
    return [
        f"{path}:{number}: {line.strip()[:80]}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]


def tracked_texts() -> dict[str, str]:
    """{path: text} of what is, or is about to be, under version control."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("this copy is not a git checkout")
    texts = {}
    for name in listing.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file():
            data = path.read_bytes()
            if b"\0" not in data[:1024]:
                texts[name] = data.decode("utf-8", errors="replace")
    return texts


def test_no_file_names_a_path_of_one_machine() -> None:
    found = machine_paths(tracked_texts())
    if found:
        about = "a path of one machine: write a relative one, or a placeholder such as DIR"
        pytest.fail("\n".join([about, *found]), pytrace=False)


def imported_by(code: str) -> list[str]:
    """Which of HEAVY a fresh interpreter holds after running `code`."""
    probe = f"{code}\nimport sys\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_is_light() -> None:
    found = imported_by("import tessera")
    assert not found, f"`import tessera` also imports {found}: import them where they are used"


# --- the rules, tested -----------------------------------------------------------------------

LONG = "    x = 1\n" * (MAX_FUNCTION_LINES + 1)

# (rule, {path below src/tessera: text}): each must be found.
PLANTED: list[tuple[str, dict[str, str]]] = [
    ("rooms_in_the_table", {"utils/x.py": ""}),
    ("rooms_in_the_table", {"helpers.py": ""}),
    ("imports_go_down", {"loss/x.py": "from tessera.opt import ogd"}),
    ("imports_go_down", {"loss/x.py": "from tessera import checkpoint"}),
    ("imports_go_down", {"loss/__init__.py": "from ..checkpoint import save"}),
    ("imports_go_down", {"loss/x.py": "import tessera.cli as c"}),
    ("imports_go_down", {"loss/x.py": "import tessera"}),
    ("imports_go_down", {"trees.py": "from tessera.errors import InputError"}),
    ("imports_go_down", {"arch/x.py": "if TYPE_CHECKING:\n    from tessera.loss import ewc"}),
    ("imports_go_down", {"arch/x.py": "importlib.import_module('tessera.loss')"}),
    ("no_star_imports", {"loss/x.py": "from tessera.ops import *"}),
    ("imports_at_the_top", {"loss/x.py": "def f():\n    import rich"}),
    (
        "imports_at_the_top",
        {"loss/x.py": "class A:\n    def f(self):\n        import os.path"},
    ),
    ("no_kwargs", {"loss/x.py": "def f(**options): ..."}),
    ("no_kwargs", {"loss/x.py": "class A:\n    def __init__(self, **options): ..."}),
    ("few_parameters", {"loss/x.py": "def f(a, b, c, d, e, *, f, g, h, i): ..."}),
    ("short_files", {"loss/x.py": "x = 1\n" * (MAX_FILE_LINES + 1)}),
    ("short_functions", {"loss/x.py": f"def f():\n{LONG}"}),
    ("abstract_or_final", {"loss/x.py": "class A: ...\nclass B(A): ..."}),
    (
        "abstract_or_final",
        {"arch/a.py": "class A: ...", "loss/x.py": "from tessera.arch import A\nclass B(A): ..."},
    ),
    (
        "shallow_classes",
        {"loss/x.py": "class A(ABC): ...\nclass B(A): ...\nclass C(B): ...\nclass D(C): ..."},
    ),
    ("no_mixins", {"loss/x.py": "class A: ...\nclass B: ...\nclass C(A, B): ..."}),
    ("dataclasses_are_values", {"loss/x.py": "@dataclass\nclass A: ..."}),
    ("dataclasses_are_values", {"loss/x.py": "@dataclass(frozen=True, slots=True)\nclass A: ..."}),
    ("dataclasses_are_values", {"loss/x.py": "@dataclasses.dataclass(eq=False)\nclass A: ..."}),
    ("dataclasses_by_keyword", {"loss/x.py": "@dataclass(frozen=True)\nclass A: ..."}),
    ("documented", {"loss/x.py": ""}),
    ("documented", {"loss/x.py": '"""Doc."""\ndef f(): ...'}),
    ("documented", {"loss/x.py": '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self): ...'}),
    (
        "examples",
        {
            "loss/__init__.py": "from tessera.loss.x import f\n__all__ = ['f']",
            "loss/x.py": 'def f():\n    """Doc without one."""',
        },
    ),
    ("examples", {"trees.py": '__all__ = ["f"]\ndef f():\n    """Example:\n    f()\n    """'}),
    ("rooms_list_what_they_offer", {"loss/__init__.py": "from tessera.loss.x import f"}),
    ("rooms_list_what_they_offer", {"loss/__init__.py": "__all__ = ['f']"}),
    ("rooms_list_what_they_offer", {"trees.py": "def f(): ...\n__all__ = []"}),
    ("nothing_unpickled", {"data/x.py": "import pickle"}),
    ("nothing_unpickled", {"data/x.py": "from joblib import load"}),
    ("nothing_unpickled", {"data/x.py": "import torch as t\nt.load(path)"}),
    ("nothing_unpickled", {"data/x.py": "from torch import load\nload(path)"}),
    ("nothing_unpickled", {"data/x.py": "import numpy as np\nnp.load(path)"}),
    ("nothing_unpickled", {"data/x.py": "import numpy as np\nnp.load(path, allow_pickle=True)"}),
    ("nothing_unpickled", {"data/x.py": "exec(text)"}),
    ("no_global_random", {"data/x.py": "import random"}),
    ("no_global_random", {"data/x.py": "import torch\ntorch.randperm(3)"}),
    ("no_global_random", {"data/x.py": "import torch\ntorch.empty(3).normal_()"}),
    ("no_global_random", {"data/x.py": "import numpy as np\nnp.random.rand(3)"}),
    ("no_global_random", {"data/x.py": "import torch\ntorch.manual_seed(0)"}),
    ("no_global_random", {"x.py": "import torch\ntorch.default_generator.manual_seed(0)"}),
]

# Breaks no rule, though it comes close to most.
CLEAN = {
    "loss/__init__.py": '"""Losses."""\n\nfrom tessera.loss.x import f\n\n__all__ = ["f"]\n',
    "loss/x.py": '''"""One loss."""
from __future__ import annotations

import torch
from dataclasses import dataclass
from typing import Protocol
from tessera import trees
from tessera.arch.anchor import Anchor
from tessera.loss.y import g


class Measure(Protocol):
    """An interface."""

    def __call__(self, x): ...


class Adam(torch.optim.Adam, Measure):
    """Has the name of its base, which is not of the package."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Value:
    """A value."""


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    a: int


def f(model, *, generator):
    """Doc.

    Example:
        >>> f(1)
    """
    model.eval()

    def inner(**options): ...

    return torch.rand(3, generator=generator)


def _private(**options): ...
''',
    "arch/anchor.py": '"""Anchors."""\n',
}


@pytest.mark.parametrize(("name", "texts"), PLANTED, ids=[name for name, _ in PLANTED])
def test_a_planted_violation_is_found(name: str, texts: dict[str, str]) -> None:
    found = list(RULES[name](sources_of(texts)))
    assert found
    assert re.search(r"src/tessera/\S+\.py:\d+: \[\w+\] ", report(name, found))


def test_every_rule_has_a_planted_violation_and_clean_code_has_none() -> None:
    assert {name for name, _ in PLANTED} == set(RULES)
    assert not [f for check in RULES.values() for f in check(sources_of(CLEAN))]


def test_errors_may_form_a_tree() -> None:
    tree = (
        "class TesseraError(Exception): ...\n"
        "class A(TesseraError, ValueError): ...\n"
        "class B(A, OSError): ..."
    )
    checks = ("abstract_or_final", "shallow_classes", "no_mixins")
    assert not [f for name in checks for f in RULES[name](sources_of({"errors.py": tree}))]


def test_the_other_checks_find_theirs() -> None:
    bad = {"a.md": "see /" + "work/x", "b.md": "open '/" + "root/y'", "c.md": "/" + "tmp/z"}
    good = {"a.md": "https://host/" + "work/x and ./" + "tmp/y and tmp/z"}
    assert len(machine_paths(bad)) == 3
    assert not machine_paths(good)
    assert imported_by("import sys; sys.modules['rich'] = sys") == ["rich"]
    assert api(sources_of({"trees.py": "__all__ = ['b', 'a']"})) == "trees.a\ntrees.b\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-api"]:
        sys.exit("usage: python tests/test_architecture.py --write-api")
    API_FILE.write_text(api(package()), "utf-8")
    print(f"wrote {API_FILE.relative_to(ROOT)}")
