"""Reports a run's metrics to TensorBoard, Weights & Biases, MLflow or trackio."""
