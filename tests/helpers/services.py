"""The services of cluster/deploy/compose.yaml on this machine: PostgreSQL, an S3 store, the MLflow server."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.deploy.support import compose
from tests.helpers.servers import s3_server
from tests.helpers.waiting import answers, wait_until

#: PostgreSQL refuses to run as root.
UNPRIVILEGED = "nobody"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgres_binaries() -> Path:
    """Returns the folder of ``initdb`` and ``postgres``, from the test dependency pgserver."""
    # Not imported, since its import creates folders in the home folder.
    from importlib.metadata import files

    [server] = [path for path in files("pgserver") or [] if str(path).endswith("bin/postgres")]
    return Path(str(server.locate())).parent


@contextmanager
def postgres(password: str) -> Iterator[int]:
    """Starts a PostgreSQL with password, user and database ``mlflow``; yields its port on 127.0.0.1."""
    binaries = postgres_binaries()
    # A short path, because it also holds the socket.
    folder = Path(tempfile.mkdtemp(prefix="gare-pg-", dir="/tmp"))
    port = free_port()
    (folder / "password").write_text(password)
    # Without the user's own settings, such as PGHOST or PGPASSWORD.
    who = {"cwd": folder, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
    if os.geteuid() == 0:
        account = pwd.getpwnam(UNPRIVILEGED)
        for path in (folder, folder / "password"):
            os.chown(path, account.pw_uid, account.pw_gid)
        who |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    try:
        subprocess.run(
            [
                binaries / "initdb",
                f"--pgdata={folder}/data",
                "--username=mlflow",
                f"--pwfile={folder}/password",
                "--auth=scram-sha-256",
                "--encoding=utf8",
                "--no-sync",
            ],
            check=True,
            capture_output=True,
            timeout=120,
            **who,
        )
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [
                    binaries / "postgres",
                    *("-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), "-k", folder),
                ],
                stdout=log,
                stderr=log,
                **who,
            )
        try:
            _make_database(port, password, server, folder / "log")
            yield port
        finally:
            # "Fast" shutdown does not wait for connected clients.
            server.send_signal(signal.SIGINT)
            server.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_database(port: int, password: str, server: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg2

    def connect() -> Any:
        with contextlib.suppress(psycopg2.OperationalError):
            return psycopg2.connect(
                host="127.0.0.1", port=port, user="mlflow", password=password, dbname="postgres"
            )

    connection = wait_until(connect, within_s=60, process=server, log=log)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE mlflow")
    connection.close()


@contextmanager
def s3() -> Iterator[str]:
    """Starts moto's S3 server with the bucket ``gare``; yields its address."""
    with s3_server() as (host, port):
        address = f"http://{host}:{port}"
        request = urllib.request.Request(f"{address}/gare", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        yield address


class MlflowServer:
    """The tracking server as compose.yaml starts it, with this machine's addresses."""

    def __init__(self, folder: Path, postgres_port: int, password: str, s3_address: str) -> None:
        self.folder, port = folder, free_port()
        self.uri = f"http://127.0.0.1:{port}"
        service = compose()["services"]["mlflow"]
        words = " ".join(service["command"])
        for inside, here in (
            ("--host=0.0.0.0", "--host=127.0.0.1"),
            ("--port=5000", f"--port={port}"),
            ("@postgres:5432", f"@127.0.0.1:{postgres_port}"),
            ("127.0.0.1:5000", f"127.0.0.1:{port}"),
            ("--workers=2", "--workers=1"),
        ):
            assert inside in words
            words = words.replace(inside, here)
        self.words = [str(Path(sys.executable).with_name("mlflow")), *words.split()[1:]]
        values = {
            "PGPASSWORD": password,
            "AWS_ENDPOINT_URL": s3_address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        }
        assert set(service["environment"]) == set(values)
        # Its huey workers and uvicorn emit warnings of their own.
        self.environment = os.environ | values | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.words,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        health = f"{self.uri}/health"
        wait_until(lambda: answers(health), within_s=240, process=self.process, log=self.log)

    def kill(self) -> None:
        """Kills the server and all its child processes, as a power failure would."""
        assert self.process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
        self.process = None

    @property
    def log(self) -> Path:
        return self.folder / "mlflow.log"
