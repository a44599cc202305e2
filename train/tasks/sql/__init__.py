"""The default task of train.sft: questions to SQL."""
