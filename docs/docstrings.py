"""Docstrings of this package name others as those of Transformers do, [`ExitConfig`]: makes these links of the site.

An extension of Griffe, which reads the package for mkdocstrings.
"""

import re
from typing import Any

import griffe


REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
# Where a name is documented: those of the reference pages.
PUBLIC = ("hf_scan", "hf_scan.calibration", "hf_scan.costs", "hf_scan.runtime", "hf_scan.data")


class TransformersReferences(griffe.Extension):
    """Replaces [`name`] by a link where the package exports the name, and by code elsewhere."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Go through all docstrings once the package is loaded."""
        self._names = self._documented(pkg)
        self._visit(pkg, set())

    def _documented(self, pkg: griffe.Module) -> dict[str, str]:
        names: dict[str, str] = {}
        for path in PUBLIC:
            module = pkg if path == "hf_scan" else pkg[path.removeprefix("hf_scan.")]
            for name in module.exports or []:
                names.setdefault(str(name), f"{path}.{name}")
        return names

    def _visit(self, node: griffe.Object | griffe.Alias, seen: set[str]) -> None:
        if node.is_alias or node.path in seen:
            return
        seen.add(node.path)
        if node.docstring:
            node.docstring.value = REFERENCE.sub(self._link, node.docstring.value)
        for member in node.members.values():
            self._visit(member, seen)

    def _link(self, match: re.Match[str]) -> str:
        short, path = match.groups()
        first, *rest = path.removeprefix("hf_scan.").split(".")
        shown = path.rsplit(".", 1)[-1] if short else path
        for name in (first, *rest[-1:]):
            if name in self._names and path.endswith(name):
                return f"[`{shown}`][{self._names[name]}]"
        return f"`{shown}`"
