"""Adapters to storage, shards, Ray and MLflow. Knows nothing of `consistency` or `pipelines`."""
