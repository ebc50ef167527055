"""Commands whose options are the settings of a process (mooncake.core.options).

The options are made when one of these commands is looked at or run: `mooncake --help` needs no models.
"""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

EPILOG = (
    "Options are also keys of --config FILE and MOONCAKE_<KEY> in the environment: docs/configuration.md."
)
_METAVARS = {"whole number": "INTEGER", "number": "NUMBER", "size": "SIZE", "cores": "CORES", "text": "TEXT"}


def settings_command(app: typer.Typer, section: str, main: Callable[[Any], None]) -> None:
    """Make `main(settings)` a command; `section`: of mooncake.core.options.SECTIONS."""

    class Lazy(TyperCommand):
        """Stands in the list of commands for the one that knows the options."""

        def make_context(self, *args: Any, **kwargs: Any) -> Any:
            return _command(section, main).make_context(*args, **kwargs)

    def stub() -> None:
        """Hold the place."""

    app.command(section, cls=Lazy, help=main.__doc__)(stub)


def _command(section: str, main: Callable[[Any], None]) -> Any:
    from mooncake.core.options import SECTIONS
    from mooncake.core.options_base import settings_of

    def run(**said: Any) -> None:
        from mooncake.cli_common import errors_told
        from mooncake.core.settings import load

        with errors_told():
            main(
                load(
                    SECTIONS[section], {key: value for key, value in said.items() if value not in (None, [])}
                )
            )

    parameters = []
    for one in settings_of(SECTIONS[section]).values():
        flag = "--" + one.key.replace("_", "-")
        default = (
            "has to be said" if one.default is None else f"default: {one.default}" if one.default else ""
        )
        help_text = f"{one.text} [{default}]" if default else one.text
        kind: Any
        if one.secret:
            continue
        if one.kind == "words":
            kind = Annotated[list[str] | None, typer.Argument(help=one.text, metavar="-- WORDS")]
        elif one.kind == "flag":
            switch = f"{flag}/--no-{flag.removeprefix('--')}"
            kind = Annotated[bool | None, typer.Option(switch, help=help_text)]
        else:
            metavar = one.kind if "|" in one.kind else _METAVARS[one.kind]
            kind = Annotated[str | None, typer.Option(flag, *one.flags, help=help_text, metavar=metavar)]
        parameters.append(
            inspect.Parameter(one.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    made = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.command(section, help=main.__doc__, epilog=EPILOG)(run)
    return typer.main.get_command(made)
