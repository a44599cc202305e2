"""Many runs over one base, side by side: `python -m train.sft --many FILE`."""
