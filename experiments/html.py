"""HTML from one function that escapes: text from files becomes text on the page, never markup.

element("td", row["step"], class_="value")
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape

VOID = ("img", "source")  # elements without content
# Colours of runs, held-out sets and phases, in figures and on pages: by appearance.
LINES = {
    "light": ("#2563ab", "#c2571a", "#2e7d4f", "#8a4fa3", "#a87b00", "#0f8285", "#b03060", "#6b7280"),
    "dark": ("#6aa5e8", "#e8925c", "#6cc191", "#c08ad6", "#d9b44a", "#5cc4c6", "#e57fa4", "#a3abb5"),
}


class Html(str):
    """Markup, which enters a page unchanged. Only this module makes it from text."""


def element(name: str, *children: object, class_: str = "", **attributes: object) -> Html:
    """Return the element. Every attribute is escaped, and every child that is not Html."""
    given = {**({"class": class_} if class_ else {}), **attributes}
    written = "".join(f' {key}="{escape(str(value))}"' for key, value in given.items())
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{joined(children)}</{name}>")


def joined(parts: Iterable[object]) -> Html:
    """Return the parts in a row, escaped unless they are Html."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


def table_row(*cells: object, class_: str = "", head: bool = False) -> Html:
    """Return a row of a table."""
    return element("tr", *(element("th" if head else "td", cell) for cell in cells), class_=class_)


def data(name: str, value: object) -> Html:
    """Return a value as JSON that a script of the page finds by the id `name`. No text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return element("script", Html(text), id=name, type="application/json")


def script(code: str) -> Html:
    """Return the page's own code, which must not come from a run's files."""
    return element("script", Html(code))


def page(title: str, body: Html, style: str = "") -> bytes:
    """Return a page in UTF-8 with the common style and, after it, `style`. A lone surrogate, which JSON can hold,
    becomes a question mark."""
    name = element("title", title)
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{name}<style>{_variables()}{STYLE}{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    return text.encode("utf-8", "replace")


def _variables() -> str:
    """Return the style of `LINES`: var(--line0), var(--line1), ..."""
    light, dark = (
        "".join(f" --line{i}: {colour};" for i, colour in enumerate(LINES[appearance])) for appearance in LINES
    )
    return f"\n:root {{{light} }}\n@media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}"


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #24292f; --faint: #646d76; --rule: #e4e7ea; --tint: #f5f6f8;
  --model: #2563ab; --other: #b6bdc6; --mark: #dcebfa; --alarm: #c62828; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191d; --ink: #dfe3e8; --faint: #9099a3; --rule: #2b3036;
  --tint: #1d2126; --model: #6aa5e8; --other: #525a64; --mark: #1f3a57; --alarm: #ff6b6b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 48px 28px 80px; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 32px; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 52px 0 14px; font-size: 20px; }
p { margin: 8px 0; max-width: 60em; }
.faint, th, figcaption { color: var(--faint); }
.verdict { margin: 28px 0 8px; font-size: 19px; max-width: none; }
.verdict strong { color: var(--model); }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: 7px 14px; margin: 14px 0 0; max-width: 760px;
  align-items: center; font-variant-numeric: tabular-nums; }
.bars div.bar { height: 22px; border-radius: 3px; background: var(--other); min-width: 2px; }
.bars div.model { background: var(--model); }
.bars .cell { display: flex; align-items: center; gap: 9px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(195px, 1fr)); gap: 10px; }
.facts div { background: var(--tint); padding: 12px 16px; border-radius: 6px; }
.facts b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts span { color: var(--faint); font-size: 13.5px; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 26px 22px; }
.plots .wide { grid-column: 1 / -1; }
.sample { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; margin: 0 0 30px; }
.sample h3 { grid-column: 1 / -1; margin: 0; font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
.sample h4 { margin: 0 0 5px; font-size: 13px; font-weight: 500; color: var(--faint); }
pre { margin: 0; padding: 12px 14px; background: var(--tint); border-radius: 6px; overflow: auto; max-height: 27em;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 4; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
table { border-collapse: collapse; font-size: 14px; }
td, th { padding: 4px 18px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule);
  font-weight: 400; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.stack { display: flex; height: 22px; max-width: 760px; border-radius: 3px; overflow: hidden; margin: 14px 0 12px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 9px; }
.scroll { overflow-x: auto; }
a { color: var(--model); }
td.value { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
tr.set td { background: var(--mark); }
.alarm { color: var(--alarm); }
summary { cursor: pointer; font-size: 20px; font-weight: 700; margin: 44px 0 12px; }
@media (max-width: 760px) { .sample { grid-template-columns: 1fr; } .plots { grid-template-columns: 1fr; } }
"""
