"""Pages and parts of pages, from the templates beside this file. Every value is escaped unless it is markup already."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A part of a page; in a notebook it shows itself.

    Attributes:
        html: without scripts, every text escaped.
    """

    html: str

    def __html__(self) -> str:
        return self.html

    def _repr_html_(self) -> str:
        return f'<div class="lda"><style>{stylesheet()}</style>{self.html}</div>'


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page, in one file that asks for no other. Attributes: html: its text."""

    html: str

    def _repr_html_(self) -> str:
        """In a frame of its own, so that its styles stay there."""
        source = Markup.escape(self.html)
        return f'<iframe srcdoc="{source}" style="width: 100%; height: 80vh; border: 0"></iframe>'


def page(template: str, **values: Any) -> Page:
    """A page from a template."""
    return Page(_templates().get_template(template).render(**values))


def exhibit(macro: str, **values: Any) -> Exhibit:
    """One of the macros of `exhibits.html.j2`."""
    return Exhibit(str(getattr(_templates().get_template("exhibits.html.j2").module, macro)(**values)))


@cache
def stylesheet() -> str:
    """What exhibits look like, in pages and in notebooks."""
    return resources.files(__package__).joinpath("templates", "exhibits.css").read_text("utf-8")


def percent(rate: float) -> str:
    """A rate to three figures."""
    return f"{100 * rate:.3g}%"


def span(low: float, high: float) -> str:
    """An interval of rates."""
    return f"{percent(low)} to {percent(high)}"


@cache
def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader(__package__, "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        percent=percent, thousands=lambda number: f"{number:,}", alpha=lambda value: f"{value:g}"
    )
    environment.globals["stylesheet"] = stylesheet
    return environment
