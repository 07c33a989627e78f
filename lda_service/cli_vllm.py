"""The options of `lda-service` that are about the vLLM backend. Turns them into the fields of `VllmConfig`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from lda_service.config import BACKENDS, VllmConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., None]

DEFAULT = VllmConfig()


class JsonObject(click.ParamType[Any]):
    """A JSON object on the command line."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Parse it, or say what it should look like."""
        try:
            found = value if isinstance(value, dict) else json.loads(value)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.fail(f"""{value!r} is no JSON object, such as '{{"gpu_memory_utilization": 0.8}}'""", param, ctx)
        return found


def _count(name: str, what: str) -> Callable[[Command], Command]:
    flag = name.replace("_", "-")
    default = getattr(DEFAULT, name)
    kind = click.IntRange(min=1)
    return click.option(f"--{flag}", envvar=name.upper(), default=default, show_default=True, type=kind, help=what)


_OPTIONS = (
    click.option(
        "--backend",
        envvar="BACKEND",
        default="native",
        show_default=True,
        type=click.Choice(BACKENDS),
        help="vllm: for pairs that outgrow one device; needs the extra lda-service[vllm].",
    ),
    _count("tensor_parallel_size", "vLLM: devices that share each layer."),
    _count("pipeline_parallel_size", "vLLM: stages that share the layers."),
    _count("nnodes", "vLLM: machines of one group; all run the same command, but for --node-rank."),
    click.option(
        "--node-rank",
        envvar="NODE_RANK",
        default=DEFAULT.node_rank,
        show_default=True,
        type=click.IntRange(min=0),
        help="vLLM: which machine of the group this is; 0 serves, the others hold their share of the models.",
    ),
    click.option(
        "--master-addr",
        envvar="MASTER_ADDR",
        default=DEFAULT.master_addr,
        show_default=True,
        help="vLLM: address of machine 0, as the others reach it. A private network only: ranks trust each other.",
    ),
    click.option(
        "--master-port",
        envvar="MASTER_PORT",
        default=DEFAULT.master_port,
        show_default=True,
        type=click.IntRange(1, 65534),
        help="vLLM: this port and the next are for the other machines.",
    ),
    click.option(
        "--vllm-args",
        "arguments",
        envvar="VLLM_ARGS",
        default={},
        type=JsonObject(),
        help="""vLLM: more of its EngineArgs as a JSON object, such as '{"gpu_memory_utilization": 0.8}'.""",
    ),
)


def vllm_options(command: Command) -> Command:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
