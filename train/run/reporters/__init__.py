"""Where a run's metrics go beside its own files: TensorBoard, Weights & Biases, MLflow, trackio."""
