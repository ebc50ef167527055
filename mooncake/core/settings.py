"""Fills a process's settings: flags > environment (MOONCAKE_KEY) > settings file > defaults."""

import difflib
import os
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from mooncake.core.config_file import ConfigFile, read_config
from mooncake.core.errors import ConfigError
from mooncake.core.options import SECTIONS, Served
from mooncake.core.options_base import ENV_PREFIX, Options, settings_of, told

LIKE: Final = 0.9
"""How alike two names are of which one is a slip of the other: below this, Kubernetes' own variables are."""

Kind = TypeVar("Kind", bound=Options)


def load(kind: type[Kind], flags: Mapping[str, Any], *, is_partial: bool = False) -> Kind:
    """Return the settings of a process; `origins` says who said what.

    Args:
        kind: its model.
        flags: what the command line says, by key.
        is_partial: what has to be said need not be.

    Raises:
        ConfigError: tells everything that is wrong, with who said it.
    """
    config = str(flags.get("config", os.environ.get(settings_of(kind)["config"].env, "")))
    file = read_config(config) if config else ConfigFile("", {})
    path = os.path.abspath(config) if config else ""
    return fill(kind, flags, file, path, is_partial=is_partial)


def fill(
    kind: type[Kind],
    flags: Mapping[str, Any],
    file: ConfigFile,
    path: str = "",
    *,
    looks_around: bool = True,
    is_partial: bool = False,
) -> Kind:
    """Return the settings of a process whose settings file has been read; see `load`.

    Args:
        kind: its model.
        flags: what the command line says, by key.
        file: what the settings file says.
        path: where that is, for later.
        looks_around: False: neither the environment nor files with secrets count.
        is_partial: what has to be said need not be.
    """
    known = settings_of(kind)
    keys = {name: one.key for one in known.values() for name in one.names}
    absent = {key: "" for key, one in known.items() if is_partial and one.default is None}
    said, problems = file.of(kind.section)
    found: dict[str, str] = {}

    class Filled(BaseSettings, kind):  # type: ignore[valid-type, misc]
        """The model of this process, as pydantic-settings fills it."""

        model_config = SettingsConfigDict(
            env_prefix=ENV_PREFIX, env_prefix_target="all", env_ignore_empty=True, enable_decoding=False
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            in_file = {key: entry.value for key, entry in said.items()}
            found.update({key: file.origin(entry) for key, entry in said.items()})
            in_env = {}
            for name, value in env_settings().items():
                if name in keys and looks_around:
                    in_env[keys[name]] = value
                    found[keys[name]] = ENV_PREFIX + name.upper()
            found.update({key: "--" + key.replace("_", "-") for key in flags})
            return (
                init_settings,
                InitSettingsSource(settings_cls, in_env),
                InitSettingsSource(settings_cls, {**absent, **in_file}),
            )

        @classmethod
        def origin(cls, key: str) -> str:
            return found.get(key, "")

    try:
        filled = Filled(**flags)
        values = {name: getattr(filled, name) for name in filled.model_fields_set}
        options: Kind = kind(**{**values, "config": path, "origins": found})
        if isinstance(options, Served) and looks_around:
            options = options.with_key()  # type: ignore[assignment]
    except ConfigError as error:
        problems = [*problems, error]  # type: ignore[list-item]
    if problems:
        raise told(problems)
    return options


def misspelt(environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables that are no setting of any process but look like one -> the one they look like."""
    known = {one.env for kind in SECTIONS.values() for one in settings_of(kind).values()}
    found = {}
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            for near in difflib.get_close_matches(name, sorted(known), n=1, cutoff=LIKE):
                found[name] = near
    return found
