"""Ray at run time: actors, batches of training, parts of extraction, devices."""
