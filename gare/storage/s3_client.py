"""Clients of S3-compatible storage by boto3, which is imported only here, and when it is needed."""

from __future__ import annotations

import os
from typing import Any


def s3_client(
    *,
    timeout_s: float,
    attempts: int = 1,
    connections: int = 10,
    anonymous: bool = False,
    endpoint: str = "",
    region: str = "",
) -> Any:
    """Returns a client with credentials from the environment, a profile, or an instance's or pod's role.

    Args:
        timeout_s: seconds to connect, and for each answer.
        attempts: tries of a request.
        connections: requests at once.
        anonymous: whether to go without credentials.
        endpoint: URL of the server; empty: from the environment or profile, else AWS.
        region: of the bucket; empty: from the environment or profile.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        # Not "standard": all requests share its budget of tries. An outage uses it up, and the first
        # connection that is lost after it is then an error.
        retries={"total_max_attempts": attempts, "mode": "legacy"},
        max_pool_connections=connections,
        signature_version=UNSIGNED if anonymous else None,
        # Servers other than AWS's need not know the checksums that boto3 adds by itself.
        request_checksum_calculation="when_required",
    )
    # AWS's other libraries read AWS_REGION, boto3 alone does not.
    return boto3.session.Session().client(
        "s3",
        region_name=region or os.environ.get("AWS_REGION") or None,
        endpoint_url=endpoint or None,
        config=config,
    )
