"""What is too long for README.md: paper against code, all results, performance, pictures."""
