"""The bench: replays a task to an endpoint in fixed batches and stores the run."""
