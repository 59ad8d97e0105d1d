"""Docstrings of this package name others as those of Transformers do, [`ExitConfig`]: makes these links of the site.

An extension of Griffe, which reads the package for mkdocstrings.
"""

import re
from typing import Any

import griffe


REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
# `name (`type`, *optional*):` of an argument, and `type`: of a result or an error, which are shown as code anyway.
ARGUMENT = re.compile(r"^( +[\w, ]+ )\((.*)\)(:.*)?$", re.MULTILINE)
RESULT = re.compile(r"^( {4,})((?:\[?`[^`]+`\]?(?:, \*optional\*)?(?: or )?)+)(:.*)?$", re.MULTILINE)
# Where a name is documented: those of the reference pages.
PUBLIC = ("hf_scan", "hf_scan.calibration", "hf_scan.costs", "hf_scan.runtime", "hf_scan.serving", "hf_scan.data")


def _identifier(module: griffe.Module, name: str) -> str:
    """The path of a public name; a function in a module of its own name is hidden by it, and lies one deeper."""
    member = module.members[name]
    target = member.final_target if member.is_alias else member
    return f"{target.path}.{name}" if target.is_module else f"{module.path}.{name}"


def _plain(types: str) -> str:
    """Types without marks, which code would show."""
    return re.sub(r"\[?`~?([^`]*)`\]?", r"\1", types).replace("*optional*", "optional")


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
            for name in map(str, module.exports or []):
                names.setdefault(name, _identifier(module, name))
        return names

    def _visit(self, node: griffe.Object | griffe.Alias, seen: set[str]) -> None:
        if node.is_alias or node.path in seen:
            return
        seen.add(node.path)
        if node.docstring:
            text = ARGUMENT.sub(lambda m: f"{m[1]}({_plain(m[2])}){m[3] or ''}", node.docstring.value)
            text = RESULT.sub(lambda m: f"{m[1]}{_plain(m[2])}{m[3] or ': '}", text)
            node.docstring.value = REFERENCE.sub(self._link, text)
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
