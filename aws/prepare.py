"""python -m aws.prepare: all that `ray up cluster.yaml` needs in an AWS account; may be run again.

Makes the bucket, the roles of head and workers, a security group that lets in SSH from one range of
addresses, and the secrets; checks credentials, region and quotas. None of it costs by the hour.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError

HERE = Path(__file__).parent
NAME = "multitask-ray"
SECRETS = Path("~/.multitask-ray")
QUOTAS = {
    "L-1216C47A": ("on-demand standard vCPUs (head and cpu nodes)", 10),
    "L-3819A6DF": ("spot G vCPUs (gpu nodes)", 4),
    "L-DB2E81BA": ("on-demand G vCPUs (gpu nodes where spot is refused)", 4),
}
"""Quota code → what it bounds, and the least that a cluster of one node of each kind needs."""
WIDEST = 8
"""Bits of the widest range of addresses that may log in: one organisation's."""
THERE_ALREADY = (
    "BucketAlreadyOwnedByYou",
    "EntityAlreadyExists",
    "InvalidPermission.Duplicate",
)


class PrepareError(ValueError):
    """What is wrong with the account, and what to do."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m aws.prepare", description="Prepare an AWS account for cluster.yaml."
    )
    parser.add_argument("--bucket", required=True, help="S3 bucket for runs; made if not there")
    parser.add_argument(
        "--ssh-from",
        required=True,
        type=address_range,
        metavar="CIDR",
        help="who may log in, e.g. 203.0.113.7/32",
    )
    parser.add_argument("--cluster", default="cluster.yaml", help="(%(default)s)")
    options = parser.parse_args(arguments)
    config = yaml.safe_load(Path(options.cluster).read_text(encoding="utf-8"))
    try:
        prepare(config, options.bucket, options.ssh_from)
    except PrepareError as error:
        sys.exit(f"error: {error}")
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"error: {error}{advice(error)}")


def address_range(text: str) -> str:
    """A range of IPv4 addresses, but none so wide that the world is in it."""
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{error}; write ADDRESS/BITS, as 203.0.113.7/32"
        ) from None
    if network.prefixlen < WIDEST:
        raise argparse.ArgumentTypeError(
            f"{network} lets {network.num_addresses:,} addresses try to log in; name your own "
            f"(ADDRESS/32), or a network of at least {WIDEST} bits"
        )
    return str(network)


def prepare(config: dict[str, Any], bucket: str, ssh_from: str) -> None:
    """Check the account, then make what is missing.

    Raises:
        PrepareError: the cluster could not be started there.
    """
    session = boto3.Session(region_name=config["provider"]["region"])
    account = session.client("sts").get_caller_identity()["Account"]
    check_instance_types(session, config)
    check_quotas(session)
    make_bucket(session, bucket)
    for role in ("head", "worker"):
        make_role(session, role, policies(role, account, session.region_name, bucket))
    # Spot machines need this role of AWS's own once in an account's life.
    spot = {"AWSServiceName": "spot.amazonaws.com"}
    once(session.client("iam").create_service_linked_role, ("InvalidInput",), **spot)
    make_security_group(session, ssh_from)
    make_secrets(SECRETS.expanduser())
    print(f"ready: ray up cluster.yaml; runs go to output_dir=s3://{bucket}/runs")


def policies(role: str, account: str, region: str, bucket: str) -> dict[str, str]:
    """Policy name → document of a role; the head runs jobs, so it has the workers' rights too."""
    names = ["head", "worker"] if role == "head" else [role]
    found = {}
    for name in names:
        text = (HERE / f"{name}-policy.json").read_text(encoding="utf-8")
        for mark, value in (("ACCOUNT", account), ("REGION", region), ("BUCKET", bucket)):
            text = text.replace(mark, value)
        found[name] = text
    return found


def check_instance_types(session: Any, config: dict[str, Any]) -> None:
    """Whether the region has the machines that cluster.yaml names."""
    nodes = config["available_node_types"].values()
    wanted = {node["node_config"]["InstanceType"] for node in nodes}
    names = [{"Name": "instance-type", "Values": sorted(wanted)}]
    offers = session.client("ec2").describe_instance_type_offerings(Filters=names)
    missing = wanted - {offer["InstanceType"] for offer in offers["InstanceTypeOfferings"]}
    if missing:
        raise PrepareError(
            f"{session.region_name} has no {', '.join(sorted(missing))}: choose another "
            "provider.region or InstanceType in cluster.yaml"
        )


def check_quotas(session: Any) -> None:
    """Say which nodes AWS would refuse; an account without GPUs may still serve on CPUs."""
    client = session.client("service-quotas")
    for code, (what, least) in QUOTAS.items():
        try:
            quota = client.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
        except ClientError as error:
            print(f"note: the quota of {what} cannot be read: {error}")
            continue
        if quota < least:
            print(
                f"warning: your quota of {what} is {quota:g}, one node of each kind needs {least}; "
                f"ask for more: aws service-quotas request-service-quota-increase --service-code "
                f"ec2 --quota-code {code} --desired-value {least}"
            )


def once(call: Callable[..., Any], but: tuple[str, ...] = (), /, **arguments: Any) -> Any:
    """Make something, unless it is there already."""
    try:
        return call(**arguments)
    except ClientError as error:
        if error.response["Error"]["Code"] not in (*THERE_ALREADY, *but):
            raise
        return None


def make_bucket(session: Any, bucket: str) -> None:
    """A bucket that nobody else can read, and whose torn uploads vanish; its own rules stay."""
    s3, region = session.client("s3"), session.region_name
    place = {} if region == "us-east-1" else {"LocationConstraint": region}
    more = {"CreateBucketConfiguration": place} if place else {}
    once(s3.create_bucket, Bucket=bucket, **more)
    shut = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    s3.put_public_access_block(
        Bucket=bucket, PublicAccessBlockConfiguration=dict.fromkeys(shut, True)
    )
    torn = {"DaysAfterInitiation": 2}
    rule = {"ID": "torn-uploads", "Status": "Enabled", "Filter": {"Prefix": ""}}
    none = ("NoSuchLifecycleConfiguration",)
    found = once(s3.get_bucket_lifecycle_configuration, none, Bucket=bucket) or {"Rules": []}
    rules = [each for each in found["Rules"] if each.get("ID") != rule["ID"]]
    rules.append({**rule, "AbortIncompleteMultipartUpload": torn})
    s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": rules})


def make_role(session: Any, role: str, documents: dict[str, str]) -> None:
    """A role with these policies, and the instance profile that hands it to machines."""
    iam, name = session.client("iam"), f"{NAME}-{role}"
    trust = (HERE / "trust.json").read_text(encoding="utf-8")
    once(iam.create_role, RoleName=name, AssumeRolePolicyDocument=trust)
    for policy, document in documents.items():
        json.loads(document)
        iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=document)
    once(iam.create_instance_profile, InstanceProfileName=name)
    holds_one = ("LimitExceeded",)
    once(iam.add_role_to_instance_profile, holds_one, InstanceProfileName=name, RoleName=name)


def rays_vpc(ec2: Any, region: str) -> str:
    """The VPC that `ray up` takes where cluster.yaml names no subnet, the default one or not: that
    of the public subnet in the last zone."""
    found = ec2.describe_subnets(Filters=[{"Name": "state", "Values": ["available"]}])["Subnets"]
    public = [subnet for subnet in found if subnet["MapPublicIpOnLaunch"]]
    if not public:
        raise PrepareError(f"{region} has no public subnet: make some (aws ec2 create-default-vpc)")
    return str(max(public, key=lambda subnet: subnet["AvailabilityZone"])["VpcId"])


def make_security_group(session: Any, ssh_from: str) -> None:
    """Machines reach each other, `ssh_from` reaches port 22, and nobody anything else.

    Ray would open port 22 to the world, but leaves a group alone that has rules. What other
    addresses the group lets in, as the range of an earlier call, is shut; other groups, as a load
    balancer's, stay.
    """
    ec2 = session.client("ec2")
    vpc = rays_vpc(ec2, session.region_name)
    named = [{"Name": "group-name", "Values": [NAME]}, {"Name": "vpc-id", "Values": [vpc]}]
    groups = ec2.describe_security_groups(Filters=named)["SecurityGroups"]
    group = (
        groups[0]["GroupId"]
        if groups
        else ec2.create_security_group(
            GroupName=NAME, Description="Ray nodes: each other, and SSH", VpcId=vpc
        )["GroupId"]
    )
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": ssh_from}]}
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    for rule in (ssh, inside):
        once(ec2.authorize_security_group_ingress, GroupId=group, IpPermissions=[rule])
    of_group = [{"Name": "group-id", "Values": [group]}]
    stale = [
        rule["SecurityGroupRuleId"]
        for rule in ec2.describe_security_group_rules(Filters=of_group)["SecurityGroupRules"]
        if not rule["IsEgress"]
        and (rule["FromPort"], rule["ToPort"], rule.get("CidrIpv4")) != (22, 22, ssh_from)
        and "ReferencedGroupInfo" not in rule
    ]
    if stale:
        ec2.revoke_security_group_ingress(GroupId=group, SecurityGroupRuleIds=stale)
        print(f"shut what else was let into {NAME}")


def make_secrets(folder: Path) -> None:
    """The cluster's token and an API key, readable by their owner alone; what is there stays."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in ("ray_token", "api_keys"):
        file = folder / name
        if not file.exists() or not file.stat().st_size:  # empty: an earlier call broke off
            file.touch(mode=0o600)
            file.write_text(f"{secrets.token_hex(32)}\n", encoding="utf-8")
            print(f"made {file}")


def advice(error: Exception) -> str:
    """What to do about a refusal that its own words leave open."""
    kind = type(error).__name__
    code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
    if kind in ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"):
        return "; log in (aws configure, aws sso login) or set AWS_PROFILE"
    if code in ("InvalidClientTokenId", "AuthFailure", "SignatureDoesNotMatch", "ExpiredToken"):
        return "; the key is wrong or has expired: log in again (aws configure, aws sso login)"
    if code in ("AccessDenied", "UnauthorizedOperation", "AccessDeniedException"):
        return "; somebody who may make roles has to run this once (aws/prepare.py says what)"
    if code in ("BucketAlreadyExists", "IllegalLocationConstraintException"):
        return "; bucket names are taken worldwide: choose another --bucket"
    if kind in ("EndpointConnectionError", "ConnectTimeoutError"):
        return "; check provider.region in cluster.yaml and the network"
    return ""


if __name__ == "__main__":
    main()
