"""Models are adapters by another name: references from the protocol's fields, and names that lead back."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import DEFAULT_TENANT, AdapterId, AdapterRef, check_name
from server.rpc.caller import caller

_TENSORS = {"text": "text_input", "fields": "*"}  # of a field of an input; others have the field's name
_INPUT = re.compile(r"inputs\[(\d+)\](?:\.(\w+))?.*")


def reference_of(model: str, version: str, *, field: str = "model_name", version_field: str = "model_version") -> str:
    """What `multilora.v1` calls a model; raises InvalidRequest on one of the two fields."""
    if not model:
        raise InvalidRequest(field, "is empty; name the model")
    if not version:
        return model
    ref = _parsed(model, field, caller().tenant)
    if "@" in model or "/versions/" in model or "/aliases/" in model:
        raise InvalidRequest(version_field, f"{version[:140]!r} is given, but {field} names a version or an alias too")
    return str(_parsed(f"{ref.tenant}/{ref.name}@{version}", version_field, ref.tenant))


def repository_reference(repository: str, model: str) -> str:
    """The model of a load or an unload; KServe's layout has its name where Triton's has the repository."""
    if not model:
        return reference_of(repository, "")
    if not repository:
        return model
    check_name("repository_name", repository)
    ref = _parsed(model, "model_name", repository)
    if ref.tenant != repository:
        raise InvalidRequest(
            "repository_name", f"{repository!r} is not the tenant of model_name, which is {ref.tenant}"
        )
    return str(ref)


def model_name(adapter: AdapterId) -> str:
    """A name by which the caller can ask for it."""
    if adapter.is_base or adapter.tenant == caller().tenant == DEFAULT_TENANT:
        return adapter.name
    return f"{adapter.tenant}/{adapter.name}"


@contextmanager
def fields_renamed(name_field: str = "model_name") -> Generator[None]:
    """What is wrong with a field of a request of ours is told of the protocol's field that it came from."""
    try:
        yield
    except InvalidRequest as error:
        raise error.at(_renamed(error.field, name_field)) from error


def _renamed(field: str, name_field: str) -> str:
    if field == "adapter":
        return name_field
    if field == "inputs":
        return field
    if place := _INPUT.fullmatch(field):
        index, part = place.groups()
        return f"inputs.{_TENSORS.get(part or 'fields', part)}[{index}]"
    return f"parameters.{field.removeprefix('sampling.').removeprefix('constraint.')}"


def _parsed(model: str, field: str, tenant: str) -> AdapterRef:
    try:
        return AdapterRef.parse(model, tenant)
    except InvalidRequest as error:
        raise error.at(field) from error
