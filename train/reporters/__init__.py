"""Reports a run's metrics beside its own files: TensorBoard, Weights & Biases, MLflow, trackio."""
