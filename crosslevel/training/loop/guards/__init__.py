"""What a training is watched for while it runs: features that collapse, a score that falls."""
