"""Everything that a GPU is needed for, in two calls of a few minutes."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter


def new_parser(program: str, description: str | None) -> ArgumentParser:
    return ArgumentParser(
        prog=program, description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
