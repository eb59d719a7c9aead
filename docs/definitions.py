"""What the site says about a definition, read from the text of its cell: nothing is run, nothing is imported.

For each function and class of an exported cell: a heading that can be linked to, the signature as it was written, the
docstring, a table of parameters with the comments beside them, and the code itself, folded.
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITION = FUNCTION | ast.ClassDef


@dataclass
class Line:
    "One line of a table: a parameter, a field of a class, or what is returned"

    name: str
    kind: str = ""  # annotation
    default: str = ""
    meaning: str = ""


@dataclass
class Definition:
    "A function, a class or a method"

    name: str  # with the class in front of it: `Masks.union`
    signature: str
    text: str  # docstring
    lines: list[Line] = field(default_factory=list)
    methods: list["Definition"] = field(default_factory=list)

    @property
    def described(self) -> bool:
        "Whether a table says more than the signature"
        return any(line.meaning for line in self.lines)


def written(node: ast.AST | None) -> str:
    "An expression as it stands in the source"
    return "" if node is None else ast.unparse(node)


def annotation(node: ast.AST | None) -> str:
    "A type, without the quotes of a name that is defined later"
    quoted = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if quoted else written(node)


def comments(source: str) -> dict[int, str]:
    "Comments by line; one alone on its line and right below another goes on with it"
    found: dict[int, str] = {}
    first, last = 0, (-1, 0)  # where a comment began; row and column of its last line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT: continue
        (row, column), text = token.start, token.string.lstrip("# ").rstrip()
        alone = not token.line[:column].strip()
        if alone and (row - 1, column) == last: found[first] += f" {text}"
        else: found[row], first = text, row
        last = (row, column)
    return found


def arguments(node: FUNCTION) -> Iterator[tuple[str, ast.arg, ast.expr | None]]:
    "Name with its stars, argument and default of every parameter"
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    for argument, default in zip(positional, defaults): yield argument.arg, argument, default
    if given.vararg: yield f"*{given.vararg.arg}", given.vararg, None
    for argument, default in zip(given.kwonlyargs, given.kw_defaults): yield argument.arg, argument, default
    if given.kwarg: yield f"**{given.kwarg.arg}", given.kwarg, None


def parameters(node: FUNCTION, notes: dict[int, str], method: bool) -> list[Line]:
    "Parameters of a function, and what it returns"
    found = []
    for at, (name, argument, default) in enumerate(arguments(node)):
        if method and at == 0 and name in ("self", "cls"): continue
        meaning = notes.get((default or argument).end_lineno, "")
        same_line = [a for _, a, d in arguments(node) if (d or a).end_lineno == (default or argument).end_lineno]
        if same_line[-1] is not argument: meaning = ""  # a comment speaks of the last parameter of its line
        found.append(Line(name, annotation(argument.annotation), written(default), meaning))
    if node.returns is not None and annotation(node.returns) != "None":
        found.append(Line("returns", annotation(node.returns), "", notes.get(node.returns.end_lineno, "")))
    return found


def signature(name: str, lines: list[Line], keyword_only: int | None = None) -> str:
    "A signature as one reads it; on several lines where one would be long"
    back = "".join(f" -> {line.kind}" for line in lines if line.name == "returns")
    parts = [line.name + (f": {line.kind}" if line.kind else "")
             + ((" = " if line.kind else "=") + line.default if line.default else "")
             for line in lines if line.name != "returns"]
    if keyword_only is not None: parts.insert(keyword_only, "*")
    short = f"{name}({', '.join(parts)}){back}"
    return short if len(short) <= 88 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){back}"


def named(node: ast.AST, *names: str) -> bool:
    "Whether an expression is one of these names, called or not"
    node = node.func if isinstance(node, ast.Call) else node
    return written(node).split(".")[-1] in names


def of_function(node: FUNCTION, notes: dict[int, str], owner: str = "") -> Definition:
    "A function, or a method of `owner`"
    static = any(named(d, "staticmethod") for d in node.decorator_list)
    lines = parameters(node, notes, bool(owner) and not static)
    only = bool(node.args.kwonlyargs) and node.args.vararg is None
    at = next((i for i, line in enumerate(lines) if only and line.name == node.args.kwonlyargs[0].arg), None)
    name = f"{owner}.{node.name}" if owner else node.name
    if any(named(d, "property", "cached_property") for d in node.decorator_list):
        head = name + "".join(f": {line.kind}" for line in lines)
    else: head = signature(name, lines, at)
    return Definition(name, head, ast.get_docstring(node) or "", lines)


def of_class(node: ast.ClassDef, notes: dict[int, str]) -> Definition:
    "A class: how it is made, its fields, and its documented methods"
    body = {part.name: part for part in node.body if isinstance(part, FUNCTION)}
    start, bases = body.get("__init__"), [written(base) for base in node.bases]
    data = any(named(d, "dataclass") for d in node.decorator_list) or "NamedTuple" in bases
    lines, keyword = [], None
    if start:
        lines = [line for line in parameters(start, notes, True) if line.name != "returns"]
        only = start.args.kwonlyargs and not start.args.vararg
        keyword = next((i for i, line in enumerate(lines) if only and line.name == start.args.kwonlyargs[0].arg), None)
    elif data:
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
        lines = [Line(part.target.id, annotation(part.annotation), written(part.value), notes.get(part.end_lineno, ""))
                 for part in fields]
    plain = node.name + (f"({', '.join(bases)})" if bases else "")
    head = signature(node.name, lines, keyword) if start or data else plain
    text = ast.get_docstring(node) or (start and ast.get_docstring(start)) or ""
    # what `nn.Module` and Python itself call needs no heading of its own
    shown = [part for part in body.values() if not part.name.startswith("_") and ast.get_docstring(part)]
    return Definition(node.name, "class " + head, text, lines, [of_function(part, notes, node.name) for part in shown])


def definitions(source: str) -> list[Definition]:
    "What a cell defines and does not keep to itself"
    notes = comments(source)
    parts = [part for part in ast.parse(source).body if isinstance(part, DEFINITION)]
    found = []
    for part in parts:
        if part.name.startswith("_"): continue
        found.append(of_class(part, notes) if isinstance(part, ast.ClassDef) else of_function(part, notes))
    return found


def constants(source: str) -> list[str]:
    "Names that a cell gives to values"
    parts = [part for part in ast.parse(source).body if isinstance(part, ast.Assign | ast.AnnAssign)]
    targets = [t for part in parts for t in (part.targets if isinstance(part, ast.Assign) else [part.target])]
    return [target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("_")]


# As Markdown


def in_table(text: str, code: bool = False) -> str:
    "A text that does not end its cell"
    text = " ".join(text.split()).replace("|", r"\|")
    return f"`{text}`" if code and text else text


def table(lines: list[Line]) -> str:
    "Parameters as a table; the column of defaults only where there are some"
    defaults = any(line.default for line in lines)
    heads = ["", "type", *(["default"] if defaults else []), "meaning"]
    rows = [[f"**{line.name}**" if line.name == "returns" else in_table(line.name, True), in_table(line.kind, True),
             *([in_table(line.default, True)] if defaults else []), in_table(line.meaning)] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def markdown(definition: Definition, link: str = "", level: int = 3) -> str:
    "One definition, and its methods one level below"
    where = f'<a class="to-source" href="{link}">source</a> ' if link else ""
    head = f":::{{code-block}} python\n:class: signature\n\n{definition.signature}\n:::"
    parts = [f"{'#' * level} {definition.name}", head, where + definition.text]
    if definition.described: parts.append(f":::{{container}} parameters\n\n{table(definition.lines)}\n\n:::")
    parts += [markdown(method, level=min(level + 1, 6)) for method in definition.methods]
    return "\n\n".join(filter(None, parts))


def folded(source: str, title: str) -> str:
    "The code of a cell behind a line to click on"
    return f'<details class="code"><summary>{title}</summary>\n\n```python\n{source.strip()}\n```\n\n</details>'


def cell_markdown(source: str, link) -> str:
    "An exported cell as the site shows it; `link` makes of a name the address of its line. Imports alone show nothing"
    try: found, values = definitions(source), constants(source)
    except SyntaxError: return ""
    if not found and not values: return ""
    texts = [markdown(definition, link(definition.name)) for definition in found]
    names = [d.name for d in found] + ([] if found else values)
    title = "Code of " + ", ".join(f"<code>{name}</code>" for name in names)
    return "\n\n".join([*texts, folded(source, title)])
