"""Where a checkpoint's chat template runs: jinja's sandbox, with a limit on its time and on what one operation makes.

The limit counts this thread's own seconds of computing, so that a busy or a suspended machine refuses nothing, and it
works in every thread. A template can only go on for long in loops, in macros that call macros, and in filters that
call filters: these look at the clock. What doubles with every turn of a loop is stopped by its size.
"""

import json
import threading
import time
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0
"""The longest that one rendering may compute; Qwen3's template takes a tenth of a millisecond a turn."""
_LARGEST = 10_000_000
"""Characters, entries or bits of the largest sum or product."""
_REPEATED = (str, list, tuple)


class OutOfTime(Exception):
    """A template has computed for `SECONDS`."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Knows what transformers lets templates use; `now` is what `strftime_now` tells."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def __init__(self, now: datetime):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = now.strftime
        self._clock = threading.local()

    def template(self, source: str) -> jinja2.Template:
        """`source` compiled, with a look at the clock wherever something can run again and again."""
        return self.from_string(_Limited().visit(self.parse(source)))

    def start_clock(self) -> None:
        """Gives this thread's next rendering its time."""
        self._clock.deadline = time.thread_time() + SECONDS

    def look_at_clock(self) -> bool:
        """True. Raises OutOfTime."""
        if time.thread_time() > self._clock.deadline:
            raise OutOfTime
        return True

    def joined(self, *parts: Any) -> str:
        """What `~` between the parts gives. Raises TemplateError where it would be too large."""
        texts = [str(part) for part in parts]
        _check_size("~", sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Raises TemplateError for a result that would be too large."""
        _check_size(operator, _size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call_filter(self, *arguments: Any, **named: Any) -> Any:
        """What `map` does with every entry."""
        self.look_at_clock()
        return super().call_filter(*arguments, **named)

    def call_test(self, *arguments: Any, **named: Any) -> Any:
        """What `select` does with every entry."""
        self.look_at_clock()
        return super().call_test(*arguments, **named)


class _Limited(jinja2.visitor.NodeTransformer):
    """Puts the sandbox's limits into a template's syntax tree."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        if node.test is not None:
            node.test = jinja2.nodes.And(_call("look_at_clock"), node.test)
        return self.visit_body(node)

    def visit_body(
        self, node: jinja2.nodes.For | jinja2.nodes.Macro | jinja2.nodes.CallBlock | jinja2.nodes.Block
    ) -> jinja2.nodes.Node:
        node.body.insert(0, jinja2.nodes.ExprStmt(_call("look_at_clock")))
        return self._placed(node)

    visit_Macro = visit_CallBlock = visit_Block = visit_body

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        return self._placed(_call("joined", *node.nodes, line=node.lineno))

    def _placed(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        visited = self.generic_visit(node)
        assert isinstance(visited, jinja2.nodes.Node)
        return visited.set_lineno(node.lineno)


def _call(method: str, *arguments: jinja2.nodes.Expr, line: int = 0) -> jinja2.nodes.Call:
    """A call of one of the sandbox's methods."""
    function = jinja2.nodes.EnvironmentAttribute(method)
    return jinja2.nodes.Call(function, list(arguments), [], None, None, lineno=line)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what an assistant wrote: here a scope and nothing more."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes <, > and & for HTML, which would put other tokens into tool definitions.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_size(operator: str, size: int) -> None:
    if size > _LARGEST:
        raise jinja2.TemplateError(f"a result of {operator} is larger than {_LARGEST:,} characters or bits")


def _size(operator: str, left: Any, right: Any) -> int:
    """Bits of a whole number, or entries of a text or a list, that the operation gives; 0 for anything else."""
    if operator == "+":
        return len(left) + len(right) if isinstance(left, _REPEATED) and isinstance(right, _REPEATED) else 0
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
    repeated, times = (left, right) if isinstance(right, int) else (right, left)
    return len(repeated) * times if isinstance(repeated, _REPEATED) and isinstance(times, int) else 0
