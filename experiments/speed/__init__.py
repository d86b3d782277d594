"""The parts of bench.py: our step and the peers', what is timed, what is counted, the table."""
