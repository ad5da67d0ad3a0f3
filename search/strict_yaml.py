"""YAML as study files have it: version 1.2's numbers and words, and nothing that refers, repeats or runs.

`parse` gives plain values and every mistake with its place. Nothing here knows what a study is.
"""

import json
import re
from typing import Any

import yaml

Place = tuple[str | int, ...]  # where in the file: ("space", "lambda", "low")
Mistake = tuple[Place, str]

MOST_BYTES = 1 << 20
MOST_LEVELS = 20


class _Loader(yaml.SafeLoader):
    """Refuses anchors, aliases, tags and depth; knows the scalars of YAML 1.2 alone."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own name for its table)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(None, None, "aliases (& and *) are not allowed", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "tags (!) are not allowed", event.start_mark)
        if self.depth >= MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_LEVELS} levels", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)


def parse(text: str) -> tuple[Any, list[Mistake]]:
    """Plain dicts, lists and scalars of a YAML text, and what is wrong with it."""
    if len(text.encode("utf-8", errors="replace")) > MOST_BYTES:
        return None, [((), "expected a study file of at most 1 MiB")]
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        if "\\t" in problem:
            problem = "a tab; indent with spaces"
        return None, [((), f"line {mark.line + 1}: {problem}" if mark else problem)]
    except yaml.reader.ReaderError as error:
        return None, [((), f"character {error.character:#x} at {error.position} is not allowed in YAML")]
    mistakes: list[Mistake] = []
    return (None if node is None else _plain((), node, mistakes)), mistakes


def _plain(path: Place, node: yaml.Node, mistakes: list[Mistake]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain((*path, i), child, mistakes) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith((":str", ":int", ":float")):
                mistakes.append((path, f"line {line}: expected a word as key"))
                continue
            key = key_node.value
            if key in found:
                mistakes.append(((*path, key), f"given twice, again in line {line}"))
            found[key] = _plain((*path, key), child, mistakes)
        return found
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "int":
        number = int(text, 0 if text[:2] in ("0o", "0x") else 10) if len(text) < 20 else 1 << 63
        if abs(number) >= 1 << 63:
            mistakes.append((path, f"expected a number below 2^63, got {short(text)}"))
        return number
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return {"null": None, "bool": text.lower() == "true"}.get(kind, text)


def short(value: Any) -> str:
    """The value in one short line."""
    text = json.dumps(value) if isinstance(value, bool | None) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
