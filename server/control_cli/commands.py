"""The commands of `multilora adapters` that need a running server, in the order in which help lists them."""

from __future__ import annotations

import typer

from server.control_cli import adding, naming, reading, residency

control_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_COMMANDS = {
    "list": reading.list_adapters,
    "show": reading.show,
    "register": adding.register,
    "upload": adding.upload,
    "load": residency.load,
    "unload": residency.unload,
    "pin": residency.pin,
    "unpin": residency.unpin,
    "alias": naming.alias,
    "delete": naming.delete,
    "watch": reading.watch,
}

for _name, _command in _COMMANDS.items():
    control_app.command(_name)(_command)
