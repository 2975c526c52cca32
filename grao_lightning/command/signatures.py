"""The settings of a class, read from its source: so that help need not wait for torch.

What a class takes is its own arguments and, where it hands the rest on, those of its bases; what
they mean stands in the ``Args:`` of their docstrings.
"""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from grao_lightning.faults import UserError
from grao_lightning.modules import MODULES

_WORDS = {"None": "null", "Any": "", "list": "list", "tuple": "list", "Sequence": "list"}


@dataclass(frozen=True)
class Setting:
    """One argument of a class.

    Attributes:
        name: As in the config.
        form: Its type or choices, such as "int" or "constant|linear|cosine".
        default: As YAML writes it; None where it must be set.
        meaning: From the docstring.
    """

    name: str
    form: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class _Class:
    module: str
    node: ast.ClassDef


def module_names() -> list[str]:
    """Return the short names of the modules that ship, the default one first."""
    return list(MODULES)


def public_path(name: str) -> str:
    """Return the dotted path of a class given by it or by a module's short name."""
    short = name.removeprefix("grao_lightning.")
    home = MODULES.get(short)
    return name if home is None else f"{home}.{short}"


def settings_of(path: str) -> list[Setting]:
    """Return the settings of a class, its own first.

    Args:
        path: Dotted.

    Raises:
        UserError: There is no such class, or none whose source can be read.
    """
    module, _, name = public_path(path).rpartition(".")
    found = _find(module, name) if module else None
    if found is None:
        raise UserError(f"no class {path!r}: give package.module.Class")
    return list(_settings(found, frozenset()))


def _settings(owner: _Class, taken: frozenset[str]) -> Iterator[Setting]:
    init = next(
        (part for part in owner.node.body if getattr(part, "name", None) == "__init__"), None
    )
    hands_on = True
    if isinstance(init, ast.FunctionDef):
        hands_on = init.args.kwarg is not None
        meanings = _meanings(ast.get_docstring(owner.node) or "")
        for argument, default in _arguments(init.args):
            if argument.arg not in taken:
                form = _form(owner.module, argument.annotation)
                yield Setting(argument.arg, form, _as_yaml(default), meanings.get(argument.arg, ""))
        taken |= {argument.arg for argument, _ in _arguments(init.args)} | _given(init)
    for base in owner.node.bases if hands_on else ():
        above = _find(owner.module, base.id) if isinstance(base, ast.Name) else None
        if above is not None:
            yield from _settings(above, taken)


def _arguments(given: ast.arguments) -> Iterator[tuple[ast.arg, ast.expr | None]]:
    """Give the arguments by name, without self, each with its default."""
    places = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(places) - len(given.defaults)) + list(given.defaults)
    yield from list(zip(places, defaults, strict=True))[1:]
    yield from zip(given.kwonlyargs, given.kw_defaults, strict=True)


def _given(init: ast.FunctionDef) -> frozenset[str]:
    """Return the arguments that ``__init__`` itself gives to its bases."""
    calls = [node for node in ast.walk(init) if isinstance(node, ast.Call)]
    return frozenset(
        keyword.arg
        for call in calls
        if ast.unparse(call.func) == "super().__init__"
        for keyword in call.keywords
        if keyword.arg is not None
    )


def _as_yaml(default: ast.expr | None) -> str | None:
    if default is None:
        return None
    try:
        value = ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)
    if isinstance(value, str):
        return value
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _form(module: str, annotation: ast.expr | None) -> str:
    """Return a type in few words; choices are listed."""
    match annotation:
        case None:
            return ""
        case ast.BinOp(left=left, right=right):
            forms = [_form(module, left), _form(module, right)]
            return "|".join(dict.fromkeys(form for form in forms if form))
        case ast.Constant(value=str(quoted)):
            return _form(module, ast.parse(quoted, mode="eval").body)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return "|".join(ast.unparse(choices).strip("()").replace("'", "").split(", "))
        case ast.Subscript(value=outer):
            return _form(module, outer)
        case ast.Name(id=name) if (alias := _alias(module, name)) is not None:
            return _form(*alias)
        case _:
            word = ast.unparse(annotation).rpartition(".")[2]
            return _WORDS.get(word, word)


def _alias(module: str, name: str) -> tuple[str, ast.expr] | None:
    """Return what a name such as ``Schedule = Literal[...]`` stands for, and where."""
    for node in _as_run(_tree(module)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return module, node.value
    home = _home(module, name)
    return None if home is None else _alias(*home)


def _find(module: str, name: str) -> _Class | None:
    """Return a class that a module defines or imports from its own package or from ours."""
    for node in _as_run(_tree(module)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Class(module, node)
    home = _home(module, name)
    if home is None:
        return None
    path = public_path(".".join(home))
    return _find(*path.rpartition(".")[::2])


def _home(module: str, name: str) -> tuple[str, str] | None:
    """Return module and name that an import takes a name from; None outside of the two packages."""
    near = {module.partition(".")[0], "grao_lightning"}
    # What is imported for type checkers alone says as well where a name is from.
    for node in (part for statement in _tree(module) for part in ast.walk(statement)):
        if not isinstance(node, ast.ImportFrom):
            continue
        for part in node.names:
            if (part.asname or part.name) == name:
                package = module.rsplit(".", node.level)[0] + "." if node.level else ""
                home = (package + (node.module or "")).rstrip(".")
                return (home, part.name) if home.partition(".")[0] in near else None
    return None


@cache
def _tree(module: str) -> list[ast.stmt]:
    """Return the statements of a module's source, which is found without importing anything."""
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top) if top else None
    if spec is None or spec.origin is None:
        return []
    path = Path(spec.origin)
    if inner:
        path = path.parent.joinpath(*inner)
        path = path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")
    if path.suffix != ".py" or not path.is_file():
        return []
    return ast.parse(path.read_text(encoding="utf-8")).body


def _as_run(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Give statements as they are run: what is for type checkers alone is left out."""
    for statement in statements:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            yield from statement.orelse
        else:
            yield statement


def _meanings(docstring: str) -> dict[str, str]:
    """Return the texts of a Google docstring's ``Args:`` by name."""
    _, _, section = docstring.partition("\nArgs:\n")
    meanings: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            meanings[name] = text
        elif name and line.strip():
            meanings[name] += f" {line.strip()}"
        elif not line.strip():
            name = ""
    return meanings
