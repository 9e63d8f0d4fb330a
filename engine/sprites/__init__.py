"""The embedded world and model: renderer, metrics, training and checkpoint."""
