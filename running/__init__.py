"""What stands around the training loop: options, device and processes, the run folder, progress,
exports."""
