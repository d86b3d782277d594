"""What stands around the training loop: options, machine, run folder, progress, exports, errors."""
