"""The parts of `train.generate`: options, prompts, adapters, answers, and the chat."""
