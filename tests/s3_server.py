"""A real S3 server of the test's own."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ACCESS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
ASKS = {"s3:ListBucket": "s3:HeadBucket", "s3:DeleteObject": "s3:DeleteObject"}
"""Right that S3 asks for at HeadBucket, and for each object of DeleteObjects → what moto asks for
instead, of the bucket."""


@contextmanager
def s3_server(bucket: str, policy: str = "") -> Iterator[tuple[Any, dict[str, str]]]:
    """A boto3 client of a server that has this bucket, and the environment that leads there.

    With a policy document the environment's keys may do what it allows, and nothing else.
    """
    pytest.importorskip("s3fs", reason="the s3 extra is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    from moto import settings

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {**ACCESS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        client = s3_client(environment)
        client.create_bucket(Bucket=bucket)
        if not policy:
            yield client, environment
            return
        everything = {"Effect": "Allow", "Action": "*", "Resource": "*"}
        owner = _user(environment, "owner", {"Version": "2012-10-17", "Statement": everything})
        user = _user(environment, "user", _as_moto_asks(json.loads(policy), bucket))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
            yield s3_client(owner), user
    finally:
        server.stop()


def checkpoints(client: Any, run: str) -> set[str]:
    """Those in a run's folder of the bucket "bucket" that its workers would go on from."""
    key = f"{run}/checkpoint_manager_snapshot.json"
    if not client.list_objects_v2(Bucket="bucket", Prefix=key).get("Contents"):
        return set()
    body = client.get_object(Bucket="bucket", Key=key)["Body"].read()
    return set(re.findall(r"checkpoint_2[\d._-]+", body.decode()))


def s3_client(environment: dict[str, str]) -> Any:
    import boto3

    return boto3.client("s3", **_arguments(environment))


def _arguments(environment: dict[str, str]) -> dict[str, str]:
    return {
        "endpoint_url": environment["AWS_ENDPOINT_URL"],
        "aws_access_key_id": environment["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
        "region_name": environment["AWS_DEFAULT_REGION"],
    }


def _user(environment: dict[str, str], name: str, policy: dict[str, Any]) -> dict[str, str]:
    """The environment of a user with this policy."""
    import boto3

    iam = boto3.client("iam", **_arguments(environment))
    name = f"{name}-{secrets.token_hex(4)}"  # servers of one process share their users
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    secret = {"AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    return {**environment, "AWS_ACCESS_KEY_ID": key["AccessKeyId"], **secret}


def _as_moto_asks(policy: dict[str, Any], bucket: str) -> dict[str, Any]:
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    asked = [asks for right, asks in ASKS.items() if right in allowed]
    of_bucket = {"Effect": "Allow", "Action": asked, "Resource": f"arn:aws:s3:::{bucket}"}
    return {**policy, "Statement": [*policy["Statement"], of_bucket]}
