"""What a failed call says: the server's own words where it spoke, else what most likely happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lora_runtime.errors import EngineStopped
from server.backend import ServerStarting
from server.control_cli.handshake import handshake_fault

REFUSED, NOT_REACHABLE = 1, 3
LATE_CHANGE = "it may still finish: `multilora adapters show` tells, and --timeout waits longer"

_NOT_SERVING = ("", ServerStarting.reason, EngineStopped.reason)
_BREAKS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED)
_BREAKS_OF_PROXIES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)  # a stream that was reset on its way


@dataclass(frozen=True, slots=True)
class Failure:
    """A call's status. `reason` is the server's stable code, empty when the status is not the server's."""

    code: grpc.StatusCode
    message: str
    reason: str

    @classmethod
    def of(cls, error: grpc.RpcError) -> Failure:
        call = cast(Any, error)  # errors of calls are calls themselves
        return cls(call.code(), call.details() or "", _reason(call))

    @property
    def exit_code(self) -> int:
        """3 without a server that serves; UNAVAILABLE may also tell of an adapter's source, which is 1."""
        is_unreachable = self.code is grpc.StatusCode.UNAVAILABLE and self.reason in _NOT_SERVING
        return NOT_REACHABLE if is_unreachable else REFUSED

    @property
    def is_break(self) -> bool:
        """Whether a stream that ended so can be resumed."""
        return self.code in _BREAKS or (self.code in _BREAKS_OF_PROXIES and not self.reason)

    def told(self, server: str, timeout_s: float, uses_tls: bool, late: str = LATE_CHANGE) -> str:
        """One line for people: what happened, and the remedy; `late` is that of an answer that did not come in time."""
        if self.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer from {server} within {timeout_s:g} s; {late}"
        if self.reason:
            return self.message
        if self.code is grpc.StatusCode.UNAVAILABLE:
            fault = handshake_fault(self.message, server, uses_tls)
            return (
                fault or f"cannot reach {server}; is the server running? (multilora serve; with TLS it needs --tls-ca)"
            )
        if self.code is grpc.StatusCode.UNIMPLEMENTED:
            return f"{server} does not offer this; it is an older multilora, or something else"
        return f"{self.message or 'no reason given'} ({self.code.name} from {server})"


def _reason(call: Any) -> str:
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # details that contradict the status: not ours
        return ""
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    return ""
