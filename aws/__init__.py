"""What an AWS account needs before `ray up cluster.yaml`."""
