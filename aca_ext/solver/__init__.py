"""Steps of a solve, common or for each sample, and the checkpoints that it keeps."""
