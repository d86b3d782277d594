"""Complete short programs that use lora2.py in other people's projects.

A test runs each of them and compares what it prints with its docstring.
"""
