"""Encoders: BERT, RoBERTa and XLM-RoBERTa, with their heads."""
