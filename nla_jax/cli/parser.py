"""The argument parser of `nla`: its help texts, its error messages, and hints for typing errors."""

import argparse
import re
from collections.abc import Iterator

from nla_jax.errors import did_you_mean, nearest


class Help(argparse.RawDescriptionHelpFormatter):
    """Append the default of an argument to its help text, unless the text states it."""

    def _get_help_string(self, action):
        text = action.help or ""
        optional = action.nargs == "?" or (action.option_strings and action.nargs != 0)
        if not optional or action.required or "default" in text:
            return text
        return f"{text} (default: {'none' if action.default in (None, '', [], ()) else '%(default)s'})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest name if the given one is unknown."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": Help, **settings})

    def _check_value(self, action, value):
        if action.choices is None or value in action.choices:
            return
        if not isinstance(action, argparse._SubParsersAction):
            names = [str(c) for c in action.choices]
            hint = did_you_mean(str(value), names)
            raise argparse.ArgumentError(action, f"{value}: must be one of {', '.join(names)}{hint}")
        hint = did_you_mean(value, action.choices)
        deep = {words[-1]: " ".join(words) for words, _ in commands(self)}
        if not hint and (near := nearest(value, deep)):  # `nla stats` is `nla data stats`
            hint = f"; did you mean '{deep[near]}'?"
        raise argparse.ArgumentError(None, f"unknown command {value!r}{hint}")

    def error(self, message: str):
        """Print the message as one line, and exit with status 2."""
        message = re.sub(r"^argument ([^:/]+)[^:]*: ", r"\1 ", message)
        self.exit(2, f"nla: {message} (`{self.prog} --help` has the arguments)\n")


def add(sub, name: str, about: str, example: str = "") -> Parser:
    """Add a command to subparsers. `about` is a phrase for the list of commands; `example` is a command."""
    return sub.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.",
                          epilog=example and f"example:\n  {example}")


def subcommands(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """Return the parsers of a parser's commands; {} if it has none."""
    found = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def commands(parser: argparse.ArgumentParser, words: tuple = ()) -> Iterator[tuple[tuple[str, ...], Parser]]:
    """Yield (its words, its parser) of every command that has no commands below it."""
    for name, below in subcommands(parser).items():
        if subcommands(below):
            yield from commands(below, (*words, name))
        else:
            yield (*words, name), below


def refuse_unknown(parser: Parser, argv: list[str]) -> None:
    """Exit with a hint if a flag is unknown. argparse would first complain about a required one."""
    while argv and (below := subcommands(parser).get(argv[0])):
        parser, argv = below, argv[1:]
    known = list(parser._option_string_actions)
    config = parser.get_default("takes_config")
    for argument in argv:
        flag = argument.partition("=")[0]
        if argument == "--":
            return
        # argparse takes an argument with a space as a value, and the start of a flag as the flag.
        if not flag.startswith("--") or " " in argument or any(k.startswith(flag) for k in known):
            continue
        if not (config and flag.startswith("--config.")):
            parser.error(f"unknown argument {argument!r}{_flag_hint(flag, known, config)}")


def _flag_hint(flag: str, known: list[str], config: bool) -> str:
    if config:
        from nla_jax import configs

        names = configs.keys(configs.default())
        if flag.lstrip("-") in names:
            return f"; did you mean '--config.{flag.lstrip('-')}'?"
    return did_you_mean(flag, known)
