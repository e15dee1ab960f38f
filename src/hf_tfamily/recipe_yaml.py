"""The YAML of recipes: that of YAML 1.2 where PyYAML reads 1.1, and no key twice.

`1e-3` is a number; `no`, `on`, `1:30` and `2024-01-01` are text; `010` is ten. What is written is read back as it was.
"""

import re
from typing import Any

import yaml

OWN_TAGS = ("bool", "float", "int", "timestamp", "value")
BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
INTEGER = re.compile(r"^([-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+|0b[01]+)$")
FLOAT = re.compile(
    r"^[-+]?((\.\d+|\d[\d_]*\.[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
)


def read_yaml(text: str) -> Any:
    """The content of a YAML document. Raises yaml.YAMLError on what is none or has a key twice, with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("lists and mappings are nested too deeply to be read") from None


def write_yaml(content: Any) -> str:
    """YAML that `read_yaml` reads back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _without_own_tags(resolvers: dict) -> dict:
    tags = [f"tag:yaml.org,2002:{tag}" for tag in OWN_TAGS]
    return {letter: [(tag, rule) for tag, rule in rules if tag not in tags] for letter, rules in resolvers.items()}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _without_own_tags(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first_lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in first_lines:
                raise yaml.constructor.ConstructorError(
                    problem=f"line {line}: the key {key.value!r} is given twice, first in line "
                    f"{first_lines[key.tag, key.value]}; keep one of them"
                )
            first_lines[key.tag, key.value] = line
        return super().construct_mapping(node, deep)

    def integer(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        base = {"0o": 8, "0x": 16, "0b": 2}.get(text[:2], 10)
        return int(text, base)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)
for own in (_Loader, _Dumper):
    own.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))
    own.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
    own.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
