"""The table from errors to gRPC codes is complete, and what it makes fits into trailers."""

from __future__ import annotations

import grpc
import pytest

from lora_runtime import errors
from lora_runtime.train.search.trial import TrialPruned
from server.backend import ServerStarting
from server.control.events import WatchTooSlow
from server.control.state import StateError, StateUnavailable
from server.control.uploads import UploadTooLarge
from server.early_refusal import DeadlineUnreachable
from server.rpc.caller import PermissionDenied
from server.rpc.errors import CODES, code_of, to_status
from server.rpc.stalls import StreamStalled
from server.rpc.uploading import UploadsDisabled, UploadStalled
from server.tenancy.authenticate import Unauthenticated
from server.tenancy.quota import Quota, QuotaExceeded

SAMPLES: list[errors.MultiloraError] = [
    errors.InvalidRequest("top_k", "is wrong"),
    errors.TextTooLong("inputs[0].text", 900, 512),
    errors.AdapterNotFound("default/news"),
    errors.AdapterAlreadyExists("default/news@1"),
    errors.AdapterRejected("NOT_FINITE", "adapter_model.safetensors", "has a NaN"),
    errors.AdapterFailed("default/news@1", errors.AdapterRejected("X", "y", "z")),
    errors.AdapterInUse("default/news@1", "is pinned; unpin it first"),
    errors.AliasNotFound("default/news@prod"),
    errors.NoPreviousVersion("default/news@prod"),
    errors.SourceUnavailable("s3://bucket/news", "is out of reach"),
    errors.LoadCancelled("default/news@1"),
    errors.TaskMismatch("default/news@1", "embed", "classify"),
    errors.AnswerNotFinite("default/news@1", 3),
    errors.BaseModelUnsupported("no"),
    errors.CapacityExceeded("full"),
    errors.DeadlineExpired("late"),
    errors.RequestCancelled("gone"),
    errors.EngineStopped("bye"),
    ServerStarting("soon"),
    DeadlineUnreachable(2.0, 1.0),
    Unauthenticated(),
    PermissionDenied("adapters"),
    QuotaExceeded("acme", Quota.TOKENS_PER_MINUTE, 1000.0, 2.5),
    StateUnavailable("disk full"),
    UploadTooLarge(2 << 20, 1 << 20),
    UploadsDisabled(),
    UploadStalled(),
    WatchTooSlow(10_000),
    StreamStalled(30.0),
]


def every_error(root: type[errors.MultiloraError]) -> set[type[errors.MultiloraError]]:
    return {root}.union(*(every_error(kind) for kind in root.__subclasses__()))


def test_every_error_that_a_server_can_meet_has_a_row() -> None:
    # of commands that make no call
    no_rpc = {errors.TrainingDataInvalid, errors.CheckpointRejected, StateError, TrialPruned}
    declared = {
        kind for kind in every_error(errors.MultiloraError) - no_rpc if not kind.__module__.startswith("tests.")
    }
    assert declared == set(CODES)
    assert {type(sample) for sample in SAMPLES} | {errors.MultiloraError} == declared


def test_a_subclass_without_a_row_takes_its_parents_code() -> None:
    class Stranger(errors.AdapterRejected):
        pass

    assert code_of(Stranger("A", "b", "c")) is grpc.StatusCode.FAILED_PRECONDITION


def test_reasons_are_distinct_and_upper_case() -> None:
    reasons = [kind.reason for kind in CODES]
    assert len(set(reasons)) == len(reasons)
    assert all(reason == reason.upper() for reason in reasons)


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_a_status_repeats_the_message(error: errors.MultiloraError) -> None:
    status = to_status(error)
    assert status.message == error.message
    assert error.reason.encode() in status.details


def test_a_long_message_still_fits_into_trailers() -> None:
    status = to_status(errors.AdapterRejected("X", "é" * 5000, "é" * 5000))
    percent_encoded = 6 * len(status.message)
    base64_encoded = len(status.details) * 4 / 3
    assert percent_encoded + base64_encoded < 8000
