"""Options that several commands share."""

import click
from click.testing import CliRunner

from kinetiq.options import joined


def test_joined_options_keep_their_order_and_serve_several_commands():
    options = joined(
        click.option("--first"), joined(click.option("--second"), click.option("--third", type=int))
    )
    for _ in range(2):

        @click.command()
        @options
        def command(**said):
            click.echo(said)

        assert [option.name for option in command.params] == ["first", "second", "third"]
        result = CliRunner().invoke(command, ["--third", "3", "--first", "a"])
        assert result.stdout == "{'third': 3, 'first': 'a', 'second': None}\n"
