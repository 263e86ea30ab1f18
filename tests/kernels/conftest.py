"""What pytest leaves out where there is no Triton: `test_triton.py` runs it in a process of its own."""

import importlib.util

collect_ignore = ["in_triton.py"] if importlib.util.find_spec("triton") is None else []
