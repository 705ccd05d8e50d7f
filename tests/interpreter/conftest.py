"""These tests run kernels through Triton's interpreter, which is chosen when Triton is first imported: they need a
process of their own with TRITON_INTERPRET=1, which scripts/test starts. Elsewhere they are not collected."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
