"""One self-contained HTML page out of sections: text, tables, figures; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common.results import write_text


@dataclass(frozen=True)
class Figure:
    """A PNG with the sentence below it."""

    png: bytes
    caption: str

    @property
    def data(self) -> str:
        """The picture as text, to stand inside the page."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column is left-aligned. ``highlight``: numbers of rows to stress."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    highlight: Sequence[int] = ()


@dataclass(frozen=True)
class Section:
    """One experiment on the page: what it is, what came out, and how to run it in full."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def anchor(self) -> str:
        """The name of the section in links."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto; max-width: 70rem;
         padding: 1.5rem; }
  h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
  nav a { margin-right: 1rem; }
  .figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
  figure { margin: 0; } img { max-width: 100%; height: auto; }
  figcaption, caption, .note, footer { color: #555; font-size: .9rem; text-align: left; }
  .scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; }
  caption { margin-bottom: .3rem; }
  th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
  th:first-child, td:first-child { text-align: left; }
  tr.stress td { font-weight: 600; }
  footer { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: .7rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for line in intro %}<p>{{ line }}</p>
{% endfor %}
{% if sections|length > 1 %}<nav>{% for section in sections %}<a href="#{{ section.anchor }}">{{ section.title }}</a>
{% endfor %}</nav>{% endif %}
{% for section in sections %}
<section id="{{ section.anchor }}">
<h2>{{ section.title }}</h2>
{% for line in section.text %}<p>{{ line }}</p>
{% endfor %}
{% for table in section.tables %}<div class="scroll"><table>
<caption>{{ table.caption }}</caption>
<thead><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr{% if loop.index0 in table.highlight %} class="stress"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
<div class="figures">
{% for figure in section.figures %}<figure>
<img alt="{{ figure.caption }}" src="data:image/png;base64,{{ figure.data }}">
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}</div>
{% for line in section.notes %}<p class="note">{{ line }}</p>
{% endfor %}
</section>
{% endfor %}
<footer>{{ footer }}</footer>
</body>
</html>
"""


def write_page(path: str | Path, title: str, sections: Sequence[Section], *, intro: Sequence[str] = (), footer: str = "") -> Path:
    """Writes the page and returns its path; all text is escaped."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=False).from_string(TEMPLATE)
    return write_text(path, template.render(title=title, sections=sections, intro=intro, footer=footer))


def machine_footer(machine: dict[str, object], versions: dict[str, str]) -> str:
    """One line about the machine and the versions that made a page."""
    parts = [str(machine.get("gpu") or machine["cpu"]), f"{machine['cores']} cores", f"{machine['threads']} thread(s)"]
    parts += [f"{name} {version}" for name, version in versions.items() if version != "not installed"]
    return ", ".join(parts)
