"""What pytest leaves out where there is no Triton: `test_triton.py` runs these in processes of their own."""

import importlib.util

collect_ignore = ["in_triton.py", "in_triton_hstu.py"] if importlib.util.find_spec("triton") is None else []
