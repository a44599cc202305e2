"""One base and many adapters over HTTP: `python -m train.serve`."""
