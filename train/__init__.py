"""Scripts that fine-tune, evaluate and serve; run from the repository as `python -m train.sft`."""

import sys

from train.extras import report_missing_package

if sys.argv[:1] == ["-m"]:  # Python's value while it looks for the module of `python -m train.NAME`
    sys.excepthook = report_missing_package
