"""Status of a job: progress, the state of a training run, memory."""
