"""The options of `lda-service` that are about access, and the command `lda-service token`.

Turns flags and environment variables into the fields of `AccessConfig`. Does not know who may call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lda_service.config import SCOPES

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., None]

_FILE = click.Path(dir_okay=False, path_type=Path)
_PORT = click.IntRange(0, 65535)

_ACCESS_OPTIONS = (
    click.option("--tokens-file", envvar="TOKENS_FILE", type=_FILE, help="Hashed tokens that callers must show."),
    click.option("--jwt-key-file", envvar="JWT_KEY_FILE", type=_FILE, help="Public key (PEM) or key set of an issuer."),
    click.option("--jwt-audience", envvar="JWT_AUDIENCE", help="Whom web tokens must be for."),
    click.option("--jwt-issuer", envvar="JWT_ISSUER", help="Who must have issued web tokens; unset does not look."),
    click.option("--tls-cert", envvar="TLS_CERT", type=_FILE, help="Certificate (PEM) of the server, and its chain."),
    click.option("--tls-key", envvar="TLS_KEY", type=_FILE, help="Private key (PEM) of the certificate."),
    click.option(
        "--tls-client-ca", envvar="TLS_CLIENT_CA", type=_FILE, help="Callers must show a certificate of these (PEM)."
    ),
    click.option(
        "--tls-client-san",
        envvar="TLS_CLIENT_SAN",
        multiple=True,
        help="DNS name or URI of which a caller's certificate must carry one; may be given several times.",
    ),
    click.option(
        "--health-port", envvar="HEALTH_PORT", type=_PORT, help="Another port, in plain text, for health checks only."
    ),
)
_PROBE_OPTIONS = (
    click.option(
        "--health-port",
        envvar="HEALTH_PORT",
        type=_PORT,
        help="Ask there, in plain text, instead of the server's port.",
    ),
    click.option("--tls", is_flag=True, help="Speak TLS, trusting the authorities of this machine."),
    click.option("--tls-ca", type=_FILE, help="Speak TLS, trusting the authorities in this PEM file."),
    click.option("--tls-cert", type=_FILE, help="Client certificate (PEM), for a server that asks for one."),
    click.option("--tls-key", type=_FILE, help="Private key (PEM) of the client certificate."),
    click.option("--tls-server-name", help="Name in the server's certificate, if it is not the host's."),
)


def access_options(command: Command) -> Command:
    """Give `serve` the fields of `AccessConfig`."""
    return _with(command, _ACCESS_OPTIONS)


def probe_options(command: Command) -> Command:
    """Give `health` what it takes to reach a secured server."""
    return _with(command, _PROBE_OPTIONS)


def probe_arguments(
    port: int,
    *,
    health_port: int | None,
    tls: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_server_name: str | None,
) -> dict[str, Any]:
    """The arguments of a health check. Raises `ConfigError` for a file that cannot be read."""
    from lda_service.rpc.tls import channel_credentials

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together.")
    if health_port or not (tls or tls_ca or tls_cert):
        return {"port": health_port or port}
    return {
        "port": port,
        "credentials": channel_credentials(tls_ca, tls_cert, tls_key),
        "server_name": tls_server_name,
    }


@click.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice(SCOPES),
    help="What it allows; may be given several times.",
)
@click.option("--expires", metavar="TIME", help="A date (its start in UTC), or a time as 2027-01-31T12:00:00Z.")
def token(name: str, scopes: tuple[str, ...], expires: str | None) -> None:
    r"""Make a token. Its line for the file of tokens goes to stdout; the token, shown only once, to stderr.

    \b
    lda-service token alice --scope generate --scope score >> tokens
    """
    from lda_service.rpc.tokens import create

    try:
        secret, line = create(name, scopes, expires)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    click.echo(line)
    click.echo(secret, err=True)


def _with(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
