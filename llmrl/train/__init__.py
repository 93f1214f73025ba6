"""The training backend: devices, optimizer, checkpoints, metrics, the run directory."""
