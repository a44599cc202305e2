"""The parts of `train.predict`: the classifier, its texts or images, and their batches."""
