"""The parts of `train.predict`: the classifier, its texts, their batches, and what is written."""
