"""The options of a call, with what files tell: --config, --many, an adapter's, and a run's own."""
