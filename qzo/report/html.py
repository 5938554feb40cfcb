"""HTML as nested calls: whatever is not made here is text, and escaped.

`element("td", label, klass="number")` gives `<td class="number">...</td>`. So nothing that stands in a file, a label or
a prompt can become markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from qzo.errors import printable

VOID = ("meta", "br", "path", "line", "circle", "rect", "polygon")
SPACES = ("\n", "\t")


class Html(str):
    """A piece of a page that needs no escaping."""


Child = Html | str | int | None


def element(name: str, /, *children: Child, **attributes: Any) -> Html:
    """An element with its children; None is left out.

    Names of attributes: `klass` and `for_` stand for class and for, `_` for `-`, and `viewBox` is as it is. Of their
    values None and False leave the attribute out, and True gives it none.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items() if value not in (None, False))
    if name in VOID and not children:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Pieces one behind the other, text among them escaped."""
    return Html("".join(child if isinstance(child, Html) else text(child) for child in children if child is not None))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 0, best: int | None = None) -> Html:
    """Rows under a head, the first column their names; `text_columns` after it hold words, the row `best` stands out.

    What does not fit is scrolled to.
    """
    kinds = ["text" if 0 < column <= text_columns else None for column in range(len(head))]
    top = [element("th", name, scope="col", klass=kind) for name, kind in zip(head, kinds, strict=True)]
    made = []
    for number, (name, *cells) in enumerate(rows):
        shown = [element("td", cell, klass=kind) for cell, kind in zip(cells, kinds[1:], strict=True)]
        made.append(element("tr", element("th", name, scope="row"), *shown, klass="best" if number == best else None))
    whole = element("table", element("thead", element("tr", *top)), element("tbody", *made))
    return element("div", whole, klass="scroll", tabindex=0)


def legend(items: Sequence[tuple[str, str]]) -> Html:
    """Names, each behind a key whose class is the second word."""
    shown = [element("li", element("span", klass=f"key {kind}", aria_hidden="true"), name) for name, kind in items]
    return element("ul", *shown, klass="legend")


def text(value: object) -> Html:
    """Text as HTML; line breaks and tabs stay, other characters that are not printable are shown as Python escapes
    them, so that none turns the direction of writing, and all can be encoded.
    """
    shown = str(value)
    if not shown.isprintable():
        shown = "".join(part if part in SPACES else printable(part) for part in shown)
    return Html(escape(shown, quote=True))


def _attribute(key: str, value: Any) -> str:
    key = {"klass": "class", "for_": "for"}.get(key, key.replace("_", "-"))
    return f" {key}" if value is True else f' {key}="{text(value)}"'
