"""One table from the error tree to gRPC codes, and the google.rpc details that errors carry."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from lora_runtime import errors
from server.backend import ServerStarting
from server.control.events import WatchTooSlow
from server.control.state import StateUnavailable
from server.control.uploads import UploadTooLarge
from server.early_refusal import DeadlineUnreachable
from server.rpc.caller import PermissionDenied
from server.rpc.stalls import StreamStalled
from server.rpc.uploading import UploadsDisabled, UploadStalled
from server.tenancy.authenticate import Unauthenticated
from server.tenancy.quota import QuotaExceeded

DOMAIN = "multilora"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
# Trailers share HTTP/2's usual 8 KiB for all headers, and a text appears in them twice, once percent-encoded.
_MAX_TEXT = 600

CODES: dict[type[errors.MultiloraError], grpc.StatusCode] = {
    errors.MultiloraError: grpc.StatusCode.INTERNAL,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.TextTooLong: grpc.StatusCode.INVALID_ARGUMENT,
    errors.AdapterNotFound: grpc.StatusCode.NOT_FOUND,
    errors.AdapterAlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.AliasNotFound: grpc.StatusCode.NOT_FOUND,
    errors.NoPreviousVersion: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AdapterInUse: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SourceUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.LoadCancelled: grpc.StatusCode.ABORTED,
    errors.AdapterRejected: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AdapterFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AnswerNotFinite: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TaskMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.BaseModelUnsupported: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CapacityExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExpired: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RequestCancelled: grpc.StatusCode.CANCELLED,
    errors.EngineStopped: grpc.StatusCode.UNAVAILABLE,
    ServerStarting: grpc.StatusCode.UNAVAILABLE,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineUnreachable: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StateUnavailable: grpc.StatusCode.UNAVAILABLE,
    UploadTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UploadsDisabled: grpc.StatusCode.FAILED_PRECONDITION,
    UploadStalled: grpc.StatusCode.ABORTED,
    WatchTooSlow: grpc.StatusCode.ABORTED,
    StreamStalled: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """An error as a client gets it: code, message, and a serialised google.rpc.Status for the trailer."""

    code: grpc.StatusCode
    message: str
    details: bytes


def code_of(error: errors.MultiloraError) -> grpc.StatusCode:
    """The code of the nearest class in the table; the base of the tree is in it, so there always is one."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def to_status(error: errors.MultiloraError) -> RpcStatus:
    """Code, message and details of a typed error."""
    details = [_error_info(error)]
    if isinstance(error, errors.InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clip(error.field), description=_clip(error.description)
        )
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if isinstance(error, QuotaExceeded):
        quota = error_details_pb2.QuotaFailure.Violation(
            subject=f"tenants/{error.subject}", description=f"{error.quota} = {error.limit:.15g}"
        )
        details.append(_pack(error_details_pb2.QuotaFailure(violations=[quota])))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return _status(code_of(error), _clip(error.message), details)


def internal_status(request_id: str) -> RpcStatus:
    """What a client learns of an unexpected error: an id to quote, and nothing of the inside."""
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"request_id": request_id})
    message = f"internal error; the server's log has the cause under request id {request_id}"
    return _status(grpc.StatusCode.INTERNAL, message, [_pack(info)])


def _error_info(error: errors.MultiloraError) -> any_pb2.Any:
    metadata = {key: _clip(value) for key, value in error.metadata.items()}
    return _pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))


def _status(code: grpc.StatusCode, message: str, details: list[any_pb2.Any]) -> RpcStatus:
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=message, details=details)
    return RpcStatus(code, message, status.SerializeToString())


def _pack(
    message: error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.RetryInfo
    | error_details_pb2.QuotaFailure,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
