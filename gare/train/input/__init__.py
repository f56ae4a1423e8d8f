"""Input of a training worker: plan, loading, augmentation and transfer of its batches."""
