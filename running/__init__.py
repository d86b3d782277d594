"""What stands around the loop: options, inputs, machine, schedule, saving, progress, errors."""
