"""The default task of `train.sft`: translating questions to SQL."""
