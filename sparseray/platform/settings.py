"""What a user gave: the values of YAML files and options, each with its place, checked key by key.

A key given twice, a value of another type and a number out of its range are refused here, with file and line, before
a configuration is made of the rest (platform/config.py). YAML is read by the rules of its version 1.2: `no`, `on`
and `1_000` are words.
"""

import difflib
import os
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from sparseray.errors import ConfigError
from sparseray.model.limits import Limits, complaint, hints_of, limits_of

MOST_SHOWN = 80
"""Characters of a wrong value in a message."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A value and where it was given: "run.yaml:12" or "--train.steps"."""

    value: Any
    place: str


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key that there is: the type and range of its value, and what holds where it is not given."""

    hint: Any
    limits: Limits
    default: Any

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.hint)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Builds YAML's nodes; plain words mean what YAML 1.2 says."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str | None, list[tuple[str, re.Pattern[str]]]]] = {}


for _kind, _words, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_words})$"), _first)


def keys_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Yield every dotted key of a dataclass, sections included.

    Args:
        kind: the dataclass.
        prefix: put before every key.
    """
    hints = hints_of(kind)
    for item in fields(kind):
        hint = hints[item.name]
        yield prefix + item.name, Key(hint=hint, limits=limits_of(item), default=item.default)
        if is_dataclass(hint):
            yield from keys_of(typing.cast(type, hint), f"{prefix}{item.name}.")


def read_options(arguments: Sequence[str], kind: type) -> dict[str, Setting]:
    """Read `--config FILE` and `--a.b value`; what comes later wins.

    Args:
        arguments: words of a command line.
        kind: dataclass whose fields are the keys.

    Raises:
        ConfigError: a file or option that cannot be used.
    """
    known = dict(keys_of(kind))
    found: dict[str, Setting] = {}
    words = iter(arguments)
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; options are --NAME VALUE, see --help")
        if name != "config" and name not in known:
            raise ConfigError(f"unknown option --{name}; {nearest(name, known)}")
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{name} needs a value")
            text = following
        if name == "config":
            found |= read_file(Path(expand_path(text, "--config")), kind)
        else:
            found |= _option(name, text, known)
    return found


def read_file(path: Path, kind: type) -> dict[str, Setting]:
    """Read a YAML file of sections.

    Args:
        path: the file.
        kind: dataclass whose fields are the keys.

    Raises:
        ConfigError: it cannot be read, or holds what cannot be used.
    """
    known = dict(keys_of(kind))
    try:
        content = path.read_bytes()
        root = _compose(content.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}; give an existing file that you may read"
        ) from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line} is not UTF-8; save the file as UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        what = "nothing" if root is None else "one value" if isinstance(root, yaml.ScalarNode) else "a list"
        raise ConfigError(f"{path} must hold sections such as 'model:' and 'train:', not {what}")
    return _of_mapping(root, "", known, str(path))


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        return node
    finally:
        loader.dispose()


def _option(name: str, text: str, known: dict[str, Key]) -> dict[str, Setting]:
    key = known[name]
    value: Any = text
    if key.hint is not str:
        try:
            node = _compose(text)
        except (yaml.YAMLError, ValueError):
            node = None
        if key.is_section:
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(
                    f"--{name}={text} is a section; give its keys, such as {_example(name, known)}"
                )
            return _of_mapping(node, f"{name}.", known, f"--{name}")
        value = text if node is None else _plain(node)
    value = _converted(key.hint, value)
    if problem := complaint(key.hint, key.limits, value):
        raise ConfigError(f"--{name}={text} {problem}; {_default(key)}")
    return {name: Setting(value=value, place=f"--{name}")}


def _of_mapping(
    root: yaml.MappingNode, prefix: str, known: dict[str, Key], source: str
) -> dict[str, Setting]:
    """Check the keys of a mapping and of the sections in it."""
    found: dict[str, Setting] = {}
    lines: dict[str, int] = {}

    def take(mapping: yaml.MappingNode, prefix: str) -> None:
        for key_node, node in mapping.value:
            line = key_node.start_mark.line + 1
            place = f"{source}:{line}"
            name = f"{prefix}{_plain(key_node) if isinstance(key_node, yaml.ScalarNode) else '?'}"
            if name in lines:
                raise ConfigError(
                    f"{place}: {name!r} is given twice, in line {lines[name]} too, and only one would count; "
                    "put all of it in one place"
                )
            lines[name] = line
            if name not in known:
                raise ConfigError(f"{place}: unknown key {name!r}; {nearest(name, known)}")
            key = known[name]
            if not key.is_section:
                found[name] = _leaf(name, node, key, place)
            elif isinstance(node, yaml.MappingNode):
                take(node, f"{name}.")
            else:
                what = "a list" if isinstance(node, yaml.SequenceNode) else _shown(node.value)
                raise ConfigError(
                    f"{place}: {name} is a section and cannot be {what if node.value else 'empty'}; "
                    f"write its keys below it, such as `{_example(name, known)}`, or remove the line"
                )

    take(root, prefix)
    return found


def _leaf(name: str, node: yaml.Node, key: Key, place: str) -> Setting:
    value = _converted(key.hint, _plain(node))
    if value is None and complaint(key.hint, key.limits, value):
        raise ConfigError(
            f"{place}: {name} has no value (null); give one or remove the line; {_default(key)}"
        )
    if problem := complaint(key.hint, key.limits, value):
        raise ConfigError(f"{place}: {name}={_shown(value)} {problem}; {_default(key)}")
    return Setting(value=value, place=place)


def _plain(node: yaml.Node) -> Any:
    """The Python value of a scalar or a list of scalars; anything else as what it is called."""
    if isinstance(node, yaml.SequenceNode):
        return tuple(_plain(i) if isinstance(i, yaml.ScalarNode) else "a list or section" for i in node.value)
    if not isinstance(node, yaml.ScalarNode):
        return {"a section": "here"}
    text, kind = str(node.value), str(node.tag).rpartition(":")[2]
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        # An explicit tag that its text does not bear out, or a number of thousands of digits.
        return text
    return text


def _converted(hint: Any, value: Any) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53:
        return float(value)
    # One word stands for all layers.
    return (value,) if hint == tuple[str, ...] and isinstance(value, str) else value


def _default(key: Key) -> str:
    return f"the default is {_yaml(key.default)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else repr(value)


def _example(section: str, known: dict[str, Key]) -> str:
    name, key = next((n, k) for n, k in known.items() if n.startswith(f"{section}.") and not k.is_section)
    return f"{name.rpartition('.')[2]}: {_yaml(key.default)}"


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Name the known key that a mistyped one is closest to.

    Args:
        name: as it was typed.
        known: keys.
    """
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "see --help for the known ones"


def expand_path(text: str, what: str) -> str:
    """Replace `~` and `$NAME` in a path, as a shell does.

    Args:
        text: the path; one that exists as it is written stays as it is.
        what: key or option, for messages.

    Raises:
        ConfigError: a variable is not set, or nobody knows where `~` is.
    """
    if "\0" in text:
        raise ConfigError(f"{what}={text!r} must not hold a NUL character")
    if os.path.lexists(text):
        return text
    expanded = os.path.expandvars(os.path.expanduser(text))
    if expanded.startswith("~"):
        raise ConfigError(
            f"{what}={text}: the home folder is not known here; set HOME, or write the path in full"
        )
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ConfigError(
            f"{what}={text}: the variable {unset[1].strip('{}')} is not set; set it, or write the path in full"
        )
    return expanded
