"""MLflow's databases of these tests, migrated once."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="package", autouse=True)
def migrated_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow fills each new SQLite file with a copy of the first that it migrated, a second apiece less."""
    from mlflow.store.db import utils

    template = tmp_path_factory.mktemp("mlflow") / "migrated.db"
    migrate = utils._initialize_tables

    def fill(engine: Any) -> None:
        if engine.url.get_backend_name() != "sqlite" or not Path(engine.url.database or "").is_file():
            migrate(engine)
        elif template.exists():
            _copy(template, engine.url.database)
        else:
            migrate(engine)
            _copy(engine.url.database, template)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", fill)
        yield


def _copy(source: str | Path, target: str | Path) -> None:
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)
