"""The paths of the metrics port, and who may ask for which."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from prometheus_client.exposition import choose_encoder

from server.metrics import ServerMetrics
from server.operations.http import Handler, Request, Response, text
from server.operations.probes import Probes
from server.tenancy.audit import AuditLog
from server.tenancy.authenticate import AUTHORIZATION, Unauthenticated
from server.tenancy.gate import Gate
from server.tenancy.model import Principal, Role

DEBUG_STATE = "/debug/state"
_ROUTER_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ASK_S = 10.0  # for a credential whose issuer is asked


class Endpoints:
    """Answers in the HTTP server's loop; credentials are checked in `loop`, where those of RPCs are."""

    def __init__(
        self,
        metrics: ServerMetrics,
        probes: Probes,
        gate: Gate,
        audit: AuditLog,
        state: Callable[[], dict[str, Any]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._metrics = metrics
        self._probes = probes
        self._gate = gate
        self._audit = audit
        self._state = state
        self._loop = loop

    @property
    def routes(self) -> Mapping[str, Handler]:
        return {
            "/metrics": self._all,
            "/metrics/router": self._router,
            "/livez": self._live,
            "/readyz": self._ready,
            DEBUG_STATE: self._debug,
        }

    async def _all(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.header("accept"))
        return Response(encode(self._metrics.registry), content_type=content_type)

    async def _router(self, _request: Request) -> Response:
        return Response(self._metrics.router_page().encode(), content_type=_ROUTER_TYPE)

    async def _live(self, _request: Request) -> Response:
        return _probe(self._probes.why_not_live())

    async def _ready(self, _request: Request) -> Response:
        return _probe(self._probes.why_not_ready())

    async def _debug(self, request: Request) -> Response:
        if (refusal := await self._refusal(request)) is not None:
            return refusal
        return Response(json.dumps(self._state(), indent=1).encode() + b"\n", content_type="application/json")

    async def _refusal(self, request: Request) -> Response | None:
        """None for an operator; where nobody is asked for a credential, for who sits at this machine."""
        if self._gate.is_open:
            if _is_local(request):
                return None
            return text(HTTPStatus.FORBIDDEN, "without --auth this is answered on loopback alone")
        tokens = tuple((name, value) for name, value in request.headers if name == AUTHORIZATION)
        asked = asyncio.run_coroutine_threadsafe(self._gate.authenticate(tokens, {}), self._loop)
        try:
            async with asyncio.timeout(_ASK_S):
                principal = await asyncio.wrap_future(asked)
        except Unauthenticated as error:
            self._record(None, "UNAUTHENTICATED", request, error.key_id)
            return text(HTTPStatus.UNAUTHORIZED, error.message, ("WWW-Authenticate", "Bearer"))
        if not principal.has(Role.OPERATOR):
            self._record(principal, "PERMISSION_DENIED", request)
            return text(HTTPStatus.FORBIDDEN, f"the credential lacks the role '{Role.OPERATOR}'")
        return None

    def _record(self, principal: Principal | None, outcome: str, request: Request, key_id: str = "") -> None:
        self._audit.record(
            principal, f"GET {DEBUG_STATE}", outcome=outcome, request_id="", peer=request.peer, key_id=key_id
        )


def _probe(why_not: str | None) -> Response:
    return text(HTTPStatus.OK, "ok") if why_not is None else text(HTTPStatus.SERVICE_UNAVAILABLE, why_not)


def _is_local(request: Request) -> bool:
    """From this machine, and meant for it: a page in a browser may have a name of its own point here."""
    host = request.header("host").lower()
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return _is_loopback(request.peer) and (name == "localhost" or _is_loopback(name))


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback
