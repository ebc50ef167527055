"""The settings file: YAML with a section for each process and one, `common`, for all; or one process's, flat.

    common:                          # of every process that has such a setting
      metadata: etcd://etcd:2379
      log_level: info
    conductor:
      ttft_slo_s: 5

Scalars are taken as they are written, as text, like those of flags and of the environment: `hugepages: off`
is off, not false. Lines are kept, so that a mistake is told with its place.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from mooncake.core.errors import ConfigError
from mooncake.core.options import SECTIONS
from mooncake.core.options_base import Options, Problem, nearest, settings_of

COMMON: Final = "common"
FILE_BYTES_MAX: Final = 1 << 20
"""A hundred times what all settings take."""
_NULL: Final = "tag:yaml.org,2002:null"


class Entry(msgspec.Struct, frozen=True):
    """What the file says of one key: text, or a list of texts."""

    value: Any
    line: int


class ConfigFile(msgspec.Struct, frozen=True):
    """A file that is well formed. `sections` of a flat one: only "", that of whoever reads it."""

    path: str
    sections: dict[str, dict[str, Entry]]
    problems: list[Problem] = []

    def origin(self, entry: Entry) -> str:
        """Return where an entry stands."""
        return f"{self.path}:{entry.line}"

    @property
    def is_flat(self) -> bool:
        """Whether it is of one process, which it does not name."""
        return "" in self.sections

    def of(self, section: str) -> tuple[dict[str, Entry], list[Problem]]:
        """Return what it says of a process, by keys, and what is wrong with that."""
        kind = SECTIONS[section]
        if self.is_flat:
            flat, wrong = self._of(kind, self.sections[""])
            return flat, [*self.problems, *wrong]
        own, problems = self._of(kind, self.sections.get(section, {}))
        keys = settings_of(kind)
        common = {key: entry for key, entry in self.sections.get(COMMON, {}).items() if key in keys}
        found, more = self._of(kind, common)
        return {**found, **own}, [*self.problems, *more, *problems]

    def _of(self, kind: type[Options], said: dict[str, Entry]) -> tuple[dict[str, Entry], list[Problem]]:
        keys = settings_of(kind)
        spellings = {name: one.key for one in keys.values() for name in one.names}
        found, problems = {}, []
        for spelling, entry in said.items():
            key = spellings.get(spelling, spelling)
            if key not in keys:
                advice = nearest(key, keys)
            elif keys[key].secret:
                advice = f"a secret: set {keys[key].env}, or name a file: {key}_file"
            elif key == "config":
                advice = "files name no other files"
            else:
                found[key] = entry
                continue
            problems.append(Problem(key, "", advice, self.origin(entry)))
        return found, problems


def read_config(path: str) -> ConfigFile:
    """Return what a settings file says.

    Raises:
        ConfigError: it cannot be read, or is not of this form.
    """
    return parse_config(read_text(path, "config"), path)


def read_text(path: str, key: str) -> str:
    """Return the text of a short file.

    Raises:
        ConfigError: it cannot be read, or is long, or no text.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{key} = {path!r}: {error.strerror}: name a file that is there") from None
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{key} = {path!r}: at most {FILE_BYTES_MAX} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key} = {path!r}: no UTF-8 at byte {error.start}") from None


def parse_config(text: str, path: str) -> ConfigFile:
    """Return what the text of a settings file says.

    Raises:
        ConfigError: it is no YAML mapping.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config = {path!r}: no YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return ConfigFile(path, {})
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"config = {path!r}: write `key: value` lines, or sections of them")
    problems: list[Problem] = []
    if not any(isinstance(value, yaml.MappingNode) for _, value in root.value):
        return ConfigFile(path, {"": _entries(root, path, problems)}, problems)
    return ConfigFile(path, _sections(root, path, problems), problems)


def _sections(root: yaml.MappingNode, path: str, problems: list[Problem]) -> dict[str, dict[str, Entry]]:
    sections: dict[str, dict[str, Entry]] = {}
    for key, value in _pairs(root, path, problems):
        where = f"{path}:{key.start_mark.line + 1}"
        if key.value not in SECTIONS and key.value != COMMON:
            names = ", ".join((COMMON, *SECTIONS))
            problems.append(Problem(key.value, "", f"no section; there are {names}", where))
        elif isinstance(value, yaml.MappingNode):
            sections[key.value] = _entries(value, path, problems)
        elif value.tag != _NULL:
            problems.append(
                Problem(key.value, "", "a section here: write its keys below it, indented", where)
            )
    everywhere = {key for kind in SECTIONS.values() for key in settings_of(kind)}
    for key, entry in sections.get(COMMON, {}).items():
        if key not in everywhere:
            problems.append(Problem(key, "", nearest(key, everywhere), f"{path}:{entry.line}"))
    return sections


def _pairs(node: yaml.MappingNode, path: str, problems: list[Problem]) -> Iterable[tuple[Any, Any]]:
    seen: set[str] = set()
    for key, value in node.value:
        where = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            problems.append(Problem("config", "", "keys are words", where))
        elif key.value in seen:
            problems.append(Problem(key.value, "", "is said twice: leave one out", where))
        else:
            seen.add(key.value)
            yield key, value


def _entries(node: yaml.MappingNode, path: str, problems: list[Problem]) -> dict[str, Entry]:
    found = {}
    for key, value in _pairs(node, path, problems):
        line = key.start_mark.line + 1
        if isinstance(value, yaml.ScalarNode):
            if value.tag != _NULL:  # `key:` alone says nothing
                found[key.value] = Entry(value.value, line)
        elif isinstance(value, yaml.SequenceNode) and all(
            isinstance(one, yaml.ScalarNode) for one in value.value
        ):
            found[key.value] = Entry([one.value for one in value.value], line)
        else:
            advice = "takes a value or a list of values, no more"
            problems.append(Problem(key.value, "", advice, f"{path}:{line}"))
    return found
