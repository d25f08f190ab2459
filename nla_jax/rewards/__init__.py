"""What RL rewards: who reads an answer, which words the reader gets, and what the answer scores."""
