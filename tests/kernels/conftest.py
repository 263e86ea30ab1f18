"""What pytest leaves to `test_triton.py`, which runs it in a process of its own."""

collect_ignore = ["in_triton.py"]
