"""Scripts that fine-tune, evaluate and serve; run from the repository as `python -m train.sft`."""

import sys
import time

from train.console.extras import report_missing_package

# When this process's Python began, by `time.monotonic`: until here it did nothing but compute. The
# age of the process says too much: `sh -c "first && second"` may run `second` in its own process.
BEGAN = time.monotonic() - time.process_time()

if sys.argv[:1] == ["-m"]:  # Python's value while it looks for the module of `python -m train.NAME`
    sys.excepthook = report_missing_package
