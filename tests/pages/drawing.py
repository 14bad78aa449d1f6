"""
Drawings as SVG text, to be read on light pages and on dark ones: each has its own paper, and follows what the reader's system
prefers.
"""

from html import escape

LIGHT = {"paper": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "line": "#8c959f"}
DARK = {"paper": "#1c2128", "ink": "#e6edf3", "soft": "#9198a1", "line": "#6e7681"}
FILLS = {
    "calm": ("#e6f4f1", "#123c38"),
    "strong": ("#0f766e", "#2dd4bf"),
    "warm": ("#fdecc8", "#5a4309"),
    "cool": ("#dbe7fb", "#1d3557"),
    "grey": ("#eef0f2", "#30363d"),
    "peer": ("#9aa4af", "#768390"),
    "bare": ("#d0d7de", "#444c56"),
}
"""What areas are filled with, on light paper and on dark."""


def _style() -> str:
    def rules(colours: dict[str, str], dark: int) -> str:
        fills = "".join(f".{name}{{fill:{pair[dark]}}}" for name, pair in FILLS.items())
        words = f"text{{fill:{colours['ink']}}}text.soft{{fill:{colours['soft']}}}.paper{{fill:{colours['paper']}}}"
        return f".line,.frame{{stroke:{colours['line']}}}.tip{{fill:{colours['line']}}}{words}{fills}"

    plain = "text{font:14px system-ui,sans-serif}text.small{font-size:12px}"
    plain += ".line{fill:none;stroke-width:1.5}.gone{fill:none;stroke-dasharray:3 4}"
    return f"{plain}{rules(LIGHT, 0)}@media(prefers-color-scheme:dark){{{rules(DARK, 1)}}}"


class Drawing:
    """A picture of so many pixels; places are their left upper corners, but those of words, which stand on a line."""

    def __init__(self, width: float, height: float, title: str, told: str) -> None:
        size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title told">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="told">{escape(told)}</desc>',
            f"<style>{_style()}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>',
            f'<rect class="paper" width="{width:g}" height="{height:g}" rx="8"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, *, framed: bool = True) -> None:
        """An area with round corners; `fill` is one of `FILLS`, or ``gone`` for none at all."""
        kind = f"{fill} frame" if framed else fill
        self._parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{5 if framed else 2}"/>'
        )

    def words(self, x: float, y: float, text: str, kind: str = "", *, anchor: str = "start") -> None:
        """A line of text; `kind` is any of ``soft`` and ``small``, `anchor` the part of it that `x` means."""
        attributes = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        self._parts.append(f'<text x="{x:g}" y="{y:g}"{attributes}>{escape(text)}</text>')

    def arrow(self, path: str) -> None:
        """A line with a tip at its end, along an SVG path."""
        self._parts.append(f'<path class="line" marker-end="url(#tip)" d="{path}"/>')

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"
