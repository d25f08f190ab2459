"""The parts of an RL step: who reads an answer, what it scores, and the loss and update of each role."""
