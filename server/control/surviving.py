"""What is left of an alias while a version that it leads to is not there: folders of the root come and go."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lora_runtime.types import DEFAULT_ALIAS, Alias


def surviving(alias: Alias, versions: Collection[int]) -> Alias | None:
    """The alias over `versions` alone; None where it leads to none of them.

    A weighted alias keeps its other version; `default` always leads somewhere, to the lowest where its own are gone.
    """
    left = [version for version in alias.versions if version in versions]
    if len(left) == len(alias.versions):
        return alias
    if not left and alias.name == DEFAULT_ALIAS and versions:
        left = [min(versions)]
    return replace(alias, version=left[0], canary_version=None, canary_percent=0.0) if left else None
