"""What Ray's launcher makes of cluster/aws.yaml, against a simulated AWS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from manifests import REPOSITORY, documents
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.utils import resource_cache
from ray.autoscaler._private.util import prepare_config

REGION = "us-west-2"


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An account with the network that every new one has; Ray writes the key pair that it makes under the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    (tmp_path / ".ssh").mkdir()
    resource_cache.cache_clear()
    with mock_aws():
        yield boto3.resource("ec2", REGION)
    resource_cache.cache_clear()


def bootstrapped(ec2: Any) -> tuple[dict[str, Any], Any]:
    """The file as somebody fills it in, through the launcher; and the security group that was made as the file says."""
    (vpc,) = ec2.vpcs.all()
    group = ec2.create_security_group(GroupName="transplant-ray", Description="Ray", VpcId=vpc.id)
    group.authorize_ingress(IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}])
    group.authorize_ingress(IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="198.51.100.0/24")
    config = documents(REPOSITORY / "cluster" / "aws.yaml")[0]
    for machine in config["available_node_types"].values():
        assert machine["node_config"]["SecurityGroupIds"] == ["sg-00000000000000000"]
        machine["node_config"]["SecurityGroupIds"] = [group.id]
    return bootstrap_aws(prepare_config(config)), group


def test_the_launcher_takes_the_machines_as_they_are_written(account: Any) -> None:
    written = documents(REPOSITORY / "cluster" / "aws.yaml")[0]["available_node_types"]
    config, group = bootstrapped(account)
    for name, machine in config["available_node_types"].items():
        ours = written[name]["node_config"] | {"SecurityGroupIds": [group.id]}
        assert ours.items() <= machine["node_config"].items()
        assert machine["node_config"]["SubnetIds"]


def test_nothing_is_opened_to_the_world(account: Any) -> None:
    _, group = bootstrapped(account)
    assert {made.group_name for made in account.security_groups.all()} == {"default", "transplant-ray"}, "Ray made one of its own"
    group.reload()
    ranges = {entry["CidrIp"] for rule in group.ip_permissions for entry in rule["IpRanges"]}
    assert ranges == {"198.51.100.0/24"}
