"""Loss, optimizer, train step, checkpoints and the loop over phases."""
