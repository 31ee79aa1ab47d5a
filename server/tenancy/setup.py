"""Everything about tenants that one server has, opened and closed together."""

from __future__ import annotations

import asyncio

from lora_runtime.types import Request
from server.metrics import ServerMetrics
from server.settings import ServeSettings
from server.startup import StartupError
from server.tenancy.audit import AuditLog
from server.tenancy.auth_file import AuthFileError
from server.tenancy.gate import Gate, PolicyShares
from server.tenancy.limits import TenantLimits
from server.tenancy.quota import QuotaExceeded
from server.tenancy.tls import ServerTls, TlsError, server_tls
from server.tenancy.usage import UsageMeter
from server.tenancy.usage_metrics import UsageMetrics


class Tenancy:
    """Raises StartupError for an auth file, certificate or audit log that cannot be used."""

    def __init__(self, settings: ServeSettings, metrics: ServerMetrics) -> None:
        self._settings = settings
        self.gate = _open_gate(settings)
        tls = _tls(settings)
        self.credentials = None if tls is None else tls.credentials
        self.certificate_expires_unix_s = None if tls is None else tls.expires_unix_s
        self.audit = _open_audit(settings)
        self.meter = UsageMeter(_payer)
        self.shares = PolicyShares(lambda: self.gate.policy)
        self._usage_metrics = UsageMetrics(self.meter)
        metrics.registry.register(self._usage_metrics)
        self.limits = TenantLimits(lambda: self.gate.policy, on_refusal=self._refused)
        self._following: asyncio.Task[None] | None = None

    @property
    def closed_methods(self) -> tuple[str, ...]:
        """Prefixes of methods of others that need a credential."""
        chosen = {"/grpc.reflection.": self._settings.reflection, "/grpc.health.": self._settings.health}
        return tuple(prefix for prefix, who in chosen.items() if who == "authenticated" and not self.gate.is_open)

    def start(self) -> None:
        """Follow the auth file from now on."""
        self._following = asyncio.create_task(self.gate.run())

    def close(self) -> None:
        """Blocks until the audit log is written."""
        if self._following is not None:
            self._following.get_loop().call_soon_threadsafe(self._following.cancel)
        self.audit.close()

    def _refused(self, error: QuotaExceeded) -> None:
        self._usage_metrics.count_rejection(error.subject, error.quota)


def _payer(request: Request) -> str:
    return request.tenant or request.adapter.tenant


def _open_gate(settings: ServeSettings) -> Gate:
    try:
        gate = Gate(settings.auth)
    except AuthFileError as error:
        raise StartupError(f"--auth: {error}") from error
    if gate.uses_client_certificates and settings.tls_client_ca is None:
        raise StartupError("--auth: has [mtls], so clients need certificates; name their CA with --tls-client-ca")
    return gate


def _tls(settings: ServeSettings) -> ServerTls | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    try:
        return server_tls(
            settings.tls_cert, settings.tls_key, settings.tls_client_ca, settings.tls_client_ca is not None
        )
    except TlsError as error:
        raise StartupError(f"--tls-cert: {error}") from error


def _open_audit(settings: ServeSettings) -> AuditLog:
    try:
        return AuditLog(settings.audit_log)
    except OSError as error:
        raise StartupError(f"--audit-log: {settings.audit_log}: {error.strerror or error}") from error
