"""cluster.yaml and the account it needs, by Ray's own launcher against a simulated AWS."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from botocore.exceptions import ClientError, EndpointConnectionError
from ray.autoscaler.node_launch_exception import NodeLaunchException

from aws import prepare
from serve_app.auth import read_keys
from serve_app.environment import SERVE_ENVIRONMENT
from tests.commands import ROOT

moto = pytest.importorskip("moto", reason="moto is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
AMI = "ami-12c6146b"  # one that moto knows: it does not resolve parameters as EC2 does
WORKERS = ("cpu", "gpu")


def client_error(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "refused"}}, "RunInstances")


def read(name: str = "cluster.yaml") -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return content


@dataclass
class Account:
    """An account that was empty, prepared twice, and has started every kind of node."""

    folder: Path
    """The user's home."""
    said: str = ""
    secrets: list[dict[str, str]] = field(default_factory=list)
    """The secrets after each preparation."""
    config: dict[str, Any] = field(default_factory=dict)
    """What `ray up` made of cluster.yaml."""
    laptop: set[str] = field(default_factory=set)
    """Actions that `ray up` asked for, as "service:Action"."""
    head: set[str] = field(default_factory=set)
    """Actions that the autoscaler asked for."""
    machines: dict[str, Any] = field(default_factory=dict)
    """Node type → instance as EC2 described it."""
    rules: list[dict[str, Any]] = field(default_factory=list)
    """Of the machines' one security group."""
    balancer: str = ""
    """The group of a load balancer that was let in between the two preparations."""
    left: list[str] = field(default_factory=list)
    """Nodes after the autoscaler ended its workers."""
    instead: Any = None
    """The machine that came when EC2 refused spot."""


@pytest.fixture(scope="module")
def asked() -> Iterator[list[str]]:
    """A simulated AWS; the actions that are asked of it."""
    from botocore.client import BaseClient

    asked: list[str] = []
    real = BaseClient._make_api_call

    def noted(client: Any, operation: str, arguments: Any) -> Any:
        asked.append(f"{client.meta.service_model.service_name}:{operation}")
        return real(client, operation, arguments)

    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
        patch.setattr(BaseClient, "_make_api_call", noted)
        yield asked


EXPIRES = {"ID": "logs", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 7}}
"""A rule that the bucket had."""


@pytest.fixture(scope="module")
def account(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Account:
    import boto3

    account = Account(tmp_path_factory.mktemp("home"))
    (account.folder / ".ssh").mkdir()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("HOME", str(account.folder))
        bucket, expires = boto3.client("s3", "us-east-1"), {**EXPIRES, "Status": "Enabled"}
        bucket.create_bucket(Bucket="my-runs")
        bucket.put_bucket_lifecycle_configuration(
            Bucket="my-runs", LifecycleConfiguration={"Rules": [expires]}
        )
        public_network_in_the_last_zone()
        for address in ("198.51.100.0/24", "203.0.113.7/32"):
            prepare.prepare(read(), "my-runs", address)
            if not account.secrets:
                open_wide("203.0.113.7/32")
                account.balancer = let_balancer_in()
            files = (account.folder / ".multitask-ray").iterdir()
            account.secrets.append({file.name: file.read_text() for file in files})
        account.said = said.getvalue()
        asked.clear()
        account.config, provider = started(read())
        account.machines["head"] = create(account.config, provider, "head")
        account.laptop = set(asked)
        asked.clear()
        for kind in WORKERS:
            account.machines[kind] = create(account.config, provider, kind)
        workers = [account.machines[kind].id for kind in WORKERS]
        provider.terminate_nodes(workers)
        account.left = provider.non_terminated_nodes({})
        account.head = set(asked)
        account.instead = refused_on_spot(account.config, provider, "InsufficientInstanceCapacity")
        with pytest.raises(NodeLaunchException, match="UnauthorizedOperation"):
            refused_on_spot(account.config, provider, "UnauthorizedOperation")
    (group,) = account.machines["cpu"].security_groups
    found = boto3.client("ec2", "us-east-1").describe_security_groups(GroupIds=[group["GroupId"]])
    (described,) = found["SecurityGroups"]
    account.rules = described["IpPermissions"]
    return account


def public_network_in_the_last_zone() -> None:
    """Beside the default VPC: Ray goes by zones, not by which VPC is the default."""
    import boto3

    ec2 = boto3.client("ec2", "us-east-1")
    subnets = ec2.describe_subnets()["Subnets"]
    last = max(subnets, key=lambda subnet: subnet["AvailabilityZone"])
    ec2.delete_subnet(SubnetId=last["SubnetId"])
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    zone = last["AvailabilityZone"]
    made = ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.0.0/20", AvailabilityZone=zone)["Subnet"]
    ec2.modify_subnet_attribute(SubnetId=made["SubnetId"], MapPublicIpOnLaunch={"Value": True})


def let_balancer_in() -> str:
    """Let a load balancer's group into the nodes' group, as the page on AWS says; returns it."""
    import boto3

    ec2 = boto3.client("ec2", "us-east-1")
    named = [{"Name": "group-name", "Values": [prepare.NAME]}]
    (group,) = ec2.describe_security_groups(Filters=named)["SecurityGroups"]
    made = ec2.create_security_group(GroupName="lb", Description="lb", VpcId=group["VpcId"])
    pairs = [{"GroupId": made["GroupId"]}]
    rule = {"IpProtocol": "tcp", "FromPort": 8000, "ToPort": 8000, "UserIdGroupPairs": pairs}
    ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[rule])
    return str(made["GroupId"])


def open_wide(address: str) -> None:
    """Let an address into the nodes' group by more ports than SSH's."""
    import boto3

    ec2 = boto3.client("ec2", "us-east-1")
    named = [{"Name": "group-name", "Values": [prepare.NAME]}]
    (group,) = ec2.describe_security_groups(Filters=named)["SecurityGroups"]
    ports = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 65535}
    rule = {**ports, "IpRanges": [{"CidrIp": address}]}
    ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[rule])


def started(config: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """What `ray up` makes of a file before it starts a head: the configuration and the provider."""
    from ray.autoscaler._private.providers import _get_node_provider, _get_node_provider_cls
    from ray.autoscaler._private.util import prepare_config, validate_config

    for node in config["available_node_types"].values():
        node["node_config"]["ImageId"] = AMI
    config = prepare_config(config)
    validate_config(config)
    kind = _get_node_provider_cls(config["provider"])
    config = kind.bootstrap_config(kind.fillout_available_node_types_resources(config))
    return config, _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)


def create(config: dict[str, Any], provider: Any, kind: str) -> Any:
    """Start one node as the autoscaler does; the machine as EC2 describes it."""
    from ray.autoscaler import tags

    labels = {
        tags.TAG_RAY_NODE_KIND: "head" if kind == "head" else "worker",
        tags.TAG_RAY_USER_NODE_TYPE: kind,
        tags.TAG_RAY_NODE_NAME: f"ray-{kind}",
        tags.TAG_RAY_LAUNCH_CONFIG: "hash",
    }
    node_config = config["available_node_types"][kind]["node_config"]
    (machine,) = provider.create_node(node_config, labels, 1).values()
    provider.non_terminated_nodes({})
    provider.set_node_tags(machine.id, {tags.TAG_RAY_NODE_STATUS: tags.STATUS_UP_TO_DATE})
    machine.reload()
    return machine


def refused_on_spot(config: dict[str, Any], provider: Any, code: str) -> Any:
    """A GPU node where EC2 answers every request for a spot machine with an error."""
    real = provider.ec2_fail_fast

    class Refusing:
        def create_instances(self, **request: Any) -> Any:
            if "InstanceMarketOptions" in request:
                raise client_error(code)
            return real.create_instances(**request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provider, "ec2_fail_fast", Refusing())
        return create(config, provider, "gpu")


def allowed(*names: str) -> set[str]:
    """Actions that policy documents allow."""
    found: set[str] = set()
    for name in names:
        for statement in json.loads((ROOT / f"aws/{name}-policy.json").read_text())["Statement"]:
            actions = statement["Action"]
            found |= set([actions] if isinstance(actions, str) else actions)
    return found


def in_containers(config: dict[str, Any]) -> dict[str, str]:
    """The environment that `docker run` gives every node."""
    options = [option.split(maxsplit=1) for option in config["docker"]["run_options"]]
    return dict(value.split("=", 1) for flag, value in options if flag == "-e")


def test_ray_itself_finds_the_file_valid_and_the_versions_are_the_project_s() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read()
    validate_config(prepare_config(config))
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert config["docker"]["image"] == f"rayproject/ray:{pinned[1]}-py311-gpu"
    assert ray.__version__ == pinned[1]
    kinds = config["available_node_types"]
    assert [kind.get("min_workers", 0) for kind in kinds.values()] == [0] * 3
    assert sorted(kinds) == ["cpu", "gpu", "head"]


def test_serve_s_settings_and_the_token_are_there_when_ray_starts_on_every_node() -> None:
    config = read()
    for role in ("head", "worker"):
        start = config[f"{role}_start_ray_commands"][1]
        assert "python -m serve_app.environment ray start" in " ".join(start.split())
    environment = in_containers(config)
    assert environment["RAY_AUTH_MODE"] == "token"
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert config["file_mounts"][str(token.parent)] == str(prepare.SECRETS)
    assert not [name for name in SERVE_ENVIRONMENT if name in str(config)]  # said in one place


def test_containers_and_machines_are_of_one_region() -> None:
    config = read()
    assert in_containers(config)["AWS_DEFAULT_REGION"] == config["provider"]["region"]


def test_every_key_is_explained() -> None:
    def keys(part: Any) -> Iterator[str]:
        for key, value in part.items() if isinstance(part, dict) else ():
            if not key.startswith("/"):
                yield key
            yield from keys(value)

    page = (ROOT / "docs/deploy-aws.md").read_text(encoding="utf-8")
    rows = page[page.index("## Every key") : page.index("## When a spot")]
    parts = {"HttpTokens", "HttpPutResponseHopLimit", "DeviceName", "Ebs", "VolumeSize"}
    parts |= {
        "VolumeType",
        "DeleteOnTermination",
        "MarketType",
        "Name",
        "node_config",
        "container_name",
    }
    assert [key for key in keys(read()) if key not in parts and key not in rows] == []


def test_a_head_without_work_and_workers_with_what_their_machines_have(account: Account) -> None:
    resources = {n: kind["resources"] for n, kind in account.config["available_node_types"].items()}
    assert resources["head"]["CPU"] == 0
    assert resources["cpu"]["CPU"] == 8
    assert "GPU" not in resources["cpu"]
    assert (resources["gpu"]["GPU"], resources["gpu"]["CPU"]) == (1, 4)


def test_every_kind_of_node_starts_with_its_own_role_and_ends(account: Account) -> None:
    for kind, machine in account.machines.items():
        role = "head" if kind == "head" else "worker"
        assert machine.iam_instance_profile["Arn"].endswith(f"/multitask-ray-{role}")
        assert (machine.instance_lifecycle == "spot") == (kind == "gpu")
        assert machine.metadata_options["HttpTokens"] == "required"
    assert account.left == [account.machines["head"].id]


def test_where_spot_is_refused_a_machine_on_demand_comes(account: Account) -> None:
    assert account.instead.instance_type == "g5.xlarge"
    assert account.instead.instance_lifecycle is None
    assert account.instead.iam_instance_profile["Arn"].endswith("/multitask-ray-worker")


def test_the_policies_allow_what_was_asked_and_no_more(account: Account) -> None:
    implied = {"iam:PassRole", "ssm:GetParameters"}  # EC2 checks these itself at RunInstances
    assert account.head == allowed("head") - implied
    # `ray down` ends machines from the laptop.
    assert account.laptop | {"ec2:TerminateInstances"} == allowed("launcher") - implied


def test_nothing_but_ssh_from_one_address_is_open(account: Account) -> None:
    opened = [
        (rule["FromPort"], rule["ToPort"], [each["CidrIp"] for each in rule["IpRanges"]])
        for rule in account.rules
        if rule["IpRanges"] or rule.get("Ipv6Ranges")
    ]
    assert opened == [(22, 22, ["203.0.113.7/32"])]
    assert "shut what else was let into" in account.said
    assert "--dashboard-host=127.0.0.1" in read()["head_start_ray_commands"][-1]


def test_a_load_balancer_stays_let_in(account: Account) -> None:
    let_in = [
        (rule.get("FromPort"), pair["GroupId"])
        for rule in account.rules
        for pair in rule["UserIdGroupPairs"]
    ]
    assert (8000, account.balancer) in let_in


def test_a_quota_of_roles_is_told_as_one() -> None:
    class Full:
        def client(self, name: str) -> Any:
            return self

        def create_role(self, **_: Any) -> None:
            raise client_error("LimitExceeded")

    with pytest.raises(ClientError, match="LimitExceeded"):
        prepare.make_role(Full(), "head", {})


def test_a_bucket_keeps_its_own_rules(account: Account) -> None:
    import boto3

    bucket = boto3.client("s3", "us-east-1")
    rules = bucket.get_bucket_lifecycle_configuration(Bucket="my-runs")["Rules"]
    assert [rule["ID"] for rule in rules] == ["logs", "torn-uploads"]
    assert rules[0]["Expiration"] == EXPIRES["Expiration"]


def test_secrets_are_the_owner_s_alone_and_stay(account: Account) -> None:
    first, again = account.secrets
    assert sorted(first) == ["api_keys", "ray_token"]
    assert first == again
    assert Path(in_containers(read())["RAY_AUTH_TOKEN_PATH"]).name in first
    files = (account.folder / ".multitask-ray").iterdir()
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert not any(secret.strip() in account.said for secret in first.values())


def test_a_key_that_is_added_to_the_file_is_one_more(tmp_path: Path) -> None:
    prepare.make_secrets(tmp_path)
    keys = tmp_path / "api_keys"
    before = read_keys(keys)
    with keys.open("a", encoding="utf-8") as file:
        file.write("another\n")
    assert read_keys(keys) == [*before, b"another"]


def test_an_empty_secret_of_a_call_that_broke_off_is_made(tmp_path: Path) -> None:
    (tmp_path / "ray_token").touch(mode=0o600)
    prepare.make_secrets(tmp_path)
    assert (tmp_path / "ray_token").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("0.0.0.0/0", "0.0.0.0/0 lets 4,294,967,296 addresses try to log in; name your own"),
        ("128.0.0.0/1", "or a network of at least 8 bits"),
        ("203.0.113.7/24", "has host bits set; write ADDRESS/BITS, as 203.0.113.7/32"),
        ("203.0.113/24", "Expected 4 octets"),
        ("::/0", "Expected 4 octets"),
        ("home", "write ADDRESS/BITS"),
    ],
)
def test_who_may_log_in_is_checked_before_anything_is_asked(
    given: str, says: str, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked.clear()
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--bucket", "b", "--ssh-from", given])
    assert stop.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert asked == []


def test_one_address_may_be_given_alone() -> None:
    assert prepare.address_range("203.0.113.7") == "203.0.113.7/32"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (EndpointConnectionError(endpoint_url="-"), "check provider.region in cluster.yaml"),
        (client_error("InvalidClientTokenId"), "the key is wrong or has expired"),
        (client_error("UnauthorizedOperation"), "somebody who may make roles has to run this"),
        (client_error("BucketAlreadyExists"), "choose another --bucket"),
    ],
)
def test_what_aws_refuses_comes_with_what_to_do(
    error: Exception, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise error

    monkeypatch.setattr(prepare, "prepare", refused)
    arguments = ["--bucket", "b", "--ssh-from", "203.0.113.7", "--cluster"]
    with pytest.raises(SystemExit) as stop:
        prepare.main([*arguments, str(ROOT / "cluster.yaml")])
    assert str(stop.value).startswith(f"error: {error}; ")
    assert advice in str(stop.value)


def test_without_credentials_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = str(ROOT / "cluster.yaml")
    with pytest.raises(SystemExit, match="Unable to locate credentials; log in"):
        prepare.main(["--bucket", "b", "--ssh-from", "203.0.113.7/32", "--cluster", file])


def test_a_region_without_these_machines_is_named(asked: list[str]) -> None:
    config = read()
    config["available_node_types"]["cpu"]["node_config"]["InstanceType"] = "x99.huge"
    asked.clear()
    with pytest.raises(prepare.PrepareError, match=r"us-east-1 has no x99\.huge: choose another"):
        prepare.prepare(config, "other-runs", "203.0.113.7/32")
    assert "s3:CreateBucket" not in asked


def test_a_quota_of_nothing_is_told_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Quotas:
        def get_service_quota(self, **_: str) -> dict[str, Any]:
            return {"Quota": {"Value": 0.0}}

    class Session:
        def client(self, _: str) -> Quotas:
            return Quotas()

    prepare.check_quotas(Session())
    said = capsys.readouterr().out
    assert "warning: your quota of spot G vCPUs (gpu nodes) is 0" in said
    assert "--quota-code L-3819A6DF" in said


def test_policies_name_the_account_and_bucket_and_no_wildcard_action() -> None:
    for name in ("head", "worker", "launcher"):
        assert not any("*" in action for action in allowed(name))
        assert f"`aws/{name}-policy.json`" in (ROOT / "docs/deploy-aws.md").read_text()
    text = "".join(prepare.policies("head", "123456789012", "us-east-1", "my-runs").values())
    assert "arn:aws:s3:::my-runs/*" in text
    assert not any(mark in text for mark in ("ACCOUNT", "REGION", "BUCKET"))
    shipped = read()["available_node_types"]
    types = {name: kind["node_config"]["InstanceType"] for name, kind in shipped.items()}
    launcher = (ROOT / "aws/launcher-policy.json").read_text(encoding="utf-8")
    assert f'"{types.pop("head")}"' in launcher
    assert all(f'"{each}"' in text for each in types.values())
