"""The paper's tables again (reproduce.py), the benchmark (bench.py), and what came out of both
(results/)."""
