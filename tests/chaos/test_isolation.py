"""Many tenants with adapters of the same names, while adapters come, go and are replaced: each answer is its own's.

The large ones: `pytest -m slow tests/chaos/test_isolation.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc import aio

from server.bench.texts import default_base
from server.pb.multilora.v1 import adapters_pb2 as pb
from server.tenancy.model import Role
from tests.oracle import ALL_LINEAR, PeftOracle, make_adapter
from tests.service.harness import classify_request
from tests.service.tenants import Caller, guarded, make_door

TEXTS = (
    "the match was lost in the last minute", "a new chip", "rates rise again, and markets fall sharply", "no", "",
    "an opera in three acts that nobody has heard for a hundred years", "rain, later snow", "who is it?",
    "the senate votes on tuesday", "goal!", "a vaccine for all of us is on its way, they say", "x y z",
)  # fmt: skip
NUM_LABELS = 5
TOLERANCE = 1e-4
SHARPNESS = 1e-2  # by which any two adapters differ on every text


@dataclass(frozen=True)
class Size:
    num_tenants: int
    num_names: int
    num_spares: int
    num_texts: int  # in all
    list_length: int
    num_clients: int
    arena_mib: int


SMALL = Size(8, 5, 8, 12_000, 6, 16, 1)
LARGE = Size(20, 10, 20, 100_000, 50, 24, 4)
PACKAGED = Size(10, 5, 8, 6_000, 6, 24, 24)  # of an encoder whose adapters have two to thirty times the bytes


@dataclass
class World:
    """The adapters of all tenants, and what PEFT says that each folder answers."""

    size: Size
    root: Path
    references: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])  # folder → [texts, labels]
    folder_of: dict[str, str] = field(default_factory=dict[str, str])  # by digest
    allowed: dict[tuple[str, str, int], set[str]] = field(default_factory=dict[tuple[str, str, int], set[str]])

    @property
    def tenants(self) -> list[str]:
        return [f"t{number}" for number in range(self.size.num_tenants)]

    @property
    def names(self) -> list[str]:
        return [f"name{number}" for number in range(self.size.num_names)]

    @property
    def adapters(self) -> Iterator[tuple[str, str]]:
        return itertools.product(self.tenants, self.names)

    @property
    def spares(self) -> list[str]:
        return [f"spares/s{number}/1" for number in range(self.size.num_spares)]

    def wrong(self, reply: Any, tenant: str, name: str, texts: list[int]) -> str:
        """What is wrong with an answer; empty: nothing."""
        folder = self.folder_of.get(reply.digest, "of no known digest")
        if reply.adapter != f"tenants/{tenant}/adapters/{name}/versions/{reply.version}":
            return f"{tenant}/{name} was answered by {reply.adapter}"
        if folder not in self.allowed[tenant, name, reply.version]:
            return f"{reply.adapter} was answered with the weights {folder}"
        found = torch.tensor([list(result.logits) for result in reply.results])
        wanted = self.references[folder][texts]
        if found.shape != wanted.shape or not torch.allclose(found, wanted, atol=TOLERANCE, rtol=TOLERANCE):
            return f"{reply.adapter} ({folder}) differs from PEFT"
        return ""


def make_world(base: Path, root: Path, size: Size) -> World:
    world = World(size, root)
    own = [f"{tenant}/{name}/1" for tenant, name in world.adapters]
    for number, folder in enumerate((*own, *world.spares)):
        targets = ALL_LINEAR if number % 3 == 0 else ["query", "value"]
        make_adapter(base, root / folder, rank=1 + number % 16, targets=targets, num_labels=NUM_LABELS, seed=number)
        oracle = PeftOracle(base, root / folder, NUM_LABELS)
        world.references[folder] = torch.stack([oracle.logits(text) for text in TEXTS])
    for tenant, name in world.adapters:
        world.allowed[tenant, name, 1] = {f"{tenant}/{name}/1"}
        world.allowed[tenant, name, 2] = set()
    return world


@contextmanager
def one_thread() -> Iterator[None]:
    """For tensors so small, threads only wait for each other; for many times as long where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> World:
    with one_thread():
        return make_world(tiny_bert, tmp_path_factory.mktemp("small") / "adapters", SMALL)


@asynccontextmanager
async def serving(world: World, base: Path, tmp_path: Path) -> AsyncGenerator[dict[str, Caller]]:
    """Callers by tenant, and `operator`; every folder's digest is known."""
    share = '[[share]]\nadapter = "t0/name0"\nwith = ["t1", "t2"]'
    door = make_door(tmp_path / "door", share)
    keys = [(tenant, tenant, (Role.INFER,)) for tenant in world.tenants]
    settings = {"base": str(base), "real": True, "threads": 1, "arena_mib": world.size.arena_mib}
    async with guarded(world.root, door, [*keys, ("operator", "ops", (Role.OPERATOR,))], **settings) as (
        server,
        callers,
    ):
        for folder in world.references:
            tenant, name, _ = folder.split("/")
            loaded = await callers["operator"](
                "LoadAdapter", pb.LoadAdapterRequest(adapter=f"{tenant}/{name}@1", wait=True)
            )
            world.folder_of[loaded.adapter.digest] = folder
        assert len(world.folder_of) == len(world.references)
        yield callers
        async with asyncio.timeout(10):
            while await server.sample("multilora_admitted_sequences"):
                await asyncio.sleep(0.01)


class Churn:
    """Loads, unloads, replacements and deletions without pause, all by an operator."""

    def __init__(self, world: World, operator: Caller) -> None:
        self._world, self._operator = world, operator
        self.done: Counter[str] = Counter()
        self.replaced: set[tuple[str, str]] = set()  # now

    async def move_in_and_out(self, seed: int) -> None:
        chance = random.Random(seed)
        while True:
            tenant, name = chance.choice([*self._world.adapters])
            adapter = f"{tenant}/{name}@1"
            await self._operator("UnloadAdapter", pb.UnloadAdapterRequest(adapter=adapter))
            if chance.random() < 0.5:
                await self._operator("LoadAdapter", pb.LoadAdapterRequest(adapter=adapter, wait=True))
            self.done["unload"] += 1
            await asyncio.sleep(chance.random() * 0.02)

    async def replace(self, seed: int, num_churners: int) -> None:
        """Version 2, of other weights each time, takes over for a while and is deleted."""
        chance = random.Random(seed)
        mine = [*self._world.adapters][seed % num_churners :: num_churners]
        while True:
            tenant, name = chance.choice(mine)
            adapter, source = f"{tenant}/{name}", chance.choice(self._world.spares)
            self._world.allowed[tenant, name, 2].add(source)
            self.replaced.add((tenant, name))
            await self._operator("RegisterAdapter", pb.RegisterAdapterRequest(name=adapter, version=2, source=source))
            await self._point(adapter, 2)
            await asyncio.sleep(chance.random() * 0.1)
            await self._point(adapter, 1)
            await self._operator("DeleteAdapter", pb.DeleteAdapterRequest(adapter=f"{adapter}@2"))
            self.replaced.discard((tenant, name))
            self.done["replace"] += 1

    async def _point(self, adapter: str, version: int) -> None:
        while True:
            request = pb.SetAliasRequest(adapter=adapter, alias="default", version=version)
            try:
                await self._operator("SetAlias", request)
                return
            except aio.AioRpcError as error:  # the other churners unloaded it while it was loaded
                if error.code() is not grpc.StatusCode.ABORTED:
                    raise


class Clients:
    """Ask at random until enough texts are answered."""

    def __init__(self, world: World, callers: dict[str, Caller], churn: Churn) -> None:
        self._world, self._callers, self._churn = world, callers, churn
        self.num_left = world.size.num_texts
        self.failures: Counter[grpc.StatusCode] = Counter()
        self.versions: Counter[int] = Counter()
        self.wrong: list[str] = []

    async def run(self, seed: int) -> None:
        chance = random.Random(seed)
        while self.num_left > 0:
            hot = self._churn.replaced if chance.random() < 0.3 else ()
            owner, name = chance.choice(sorted(hot) or [*self._world.adapters])
            caller = owner
            if caller in ("t1", "t2") and chance.random() < 0.1:
                owner, name = "t0", "name0"
            texts = chance.choices(range(len(TEXTS)), k=self._world.size.list_length)
            self.num_left -= len(texts)
            spelling = name if owner == caller else f"{owner}/{name}"
            suffix = chance.choice(("", "", "@1", "@default"))
            request = classify_request(spelling + suffix, *(TEXTS[text] for text in texts), return_logits=True)
            try:
                reply = await self._callers[caller]("Classify", request)
            except aio.AioRpcError as error:
                self.failures[error.code()] += 1
                continue
            self.versions[reply.version] += 1
            if wrong := self._world.wrong(reply, owner, name, texts):
                self.wrong.append(wrong)


def assert_sharp(world: World) -> None:
    """Whichever weights were taken for others, on whichever text, it would be seen."""
    answers = torch.stack([*world.references.values()])  # [folders, texts, labels]
    for index, answer in enumerate(answers[:-1]):
        differences = (answers[index + 1 :] - answer).abs().amax(-1)
        assert differences.min() > SHARPNESS


async def storm(world: World, base: Path, tmp_path: Path) -> None:
    assert_sharp(world)
    async with serving(world, base, tmp_path) as callers:
        churn = Churn(world, callers["operator"])
        clients = Clients(world, callers, churn)
        churners = [
            asyncio.create_task(churn.move_in_and_out(0)),
            *(asyncio.create_task(churn.replace(seed, 3)) for seed in range(3)),
        ]
        await asyncio.gather(*(clients.run(seed) for seed in range(world.size.num_clients)))
        for churner in churners:
            assert not churner.done(), churner.exception()
            churner.cancel()
        await asyncio.gather(*churners, return_exceptions=True)
    assert clients.wrong == []
    assert not clients.failures, clients.failures
    assert churn.done["unload"] > 20 and churn.done["replace"] > 10, "the storm did not happen"
    assert clients.versions[1] > 100 and clients.versions[2] > 20, "the storm did not happen"


async def test_every_answer_is_its_own_adapters(small: World, tiny_bert: Path, tmp_path: Path) -> None:
    await storm(small, tiny_bert, tmp_path)


async def test_adapters_taken_for_each_other_would_be_seen(small: World, tiny_bert: Path, tmp_path: Path) -> None:
    """The comparison fails for a pair of one name and two tenants, swapped on purpose: by weights, and by name."""
    async with serving(small, tiny_bert, tmp_path) as callers:
        texts = [*range(len(TEXTS))]
        request = classify_request("name1", *TEXTS, return_logits=True)
        first, second = await callers["t1"]("Classify", request), await callers["t2"]("Classify", request)
    assert small.wrong(first, "t1", "name1", texts) == small.wrong(second, "t2", "name1", texts) == ""
    assert "was answered by" in small.wrong(second, "t1", "name1", texts)
    second.adapter = first.adapter
    assert "with the weights t2/name1/1" in small.wrong(second, "t1", "name1", texts)
    second.digest = first.digest
    assert "differs from PEFT" in small.wrong(second, "t1", "name1", texts)
    for text in texts:  # and on each text alone
        one = type(first)(adapter=first.adapter, version=1, digest=first.digest, results=[second.results[text]])
        assert "differs from PEFT" in small.wrong(one, "t1", "name1", [text])


@pytest.mark.slow
async def test_every_answer_is_its_own_adapters_of_two_hundred(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tmp_path: Path
) -> None:
    with one_thread():
        world = make_world(tiny_bert, tmp_path_factory.mktemp("large") / "adapters", LARGE)
    await storm(world, tiny_bert, tmp_path)


@pytest.mark.slow
async def test_every_answer_of_the_packaged_encoder_is_its_own_adapters(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    base = Path(default_base())
    world = make_world(base, tmp_path_factory.mktemp("packaged") / "adapters", PACKAGED)
    await storm(world, base, tmp_path)
