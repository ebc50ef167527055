"""Engines in one process, each with its own socket folder; closed after the test whatever happens."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from transfer.config import EngineConfig
from transfer.engine import TransferEngine

MakeEngine = Callable[..., TransferEngine]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    engines: list[TransferEngine] = []
    numbers = itertools.count()

    def make(**settings: object) -> TransferEngine:
        settings.setdefault("run_dir", str(tmp_path / f"e{next(numbers)}"))
        engine = TransferEngine(EngineConfig(**settings)).start()  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def pair(make_engine: MakeEngine) -> tuple[TransferEngine, TransferEngine]:
    """(initiator, owner)"""
    return make_engine(), make_engine()
