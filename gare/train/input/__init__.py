"""What a training worker reads: plan, loading, augmentation and transfer of its batches."""
