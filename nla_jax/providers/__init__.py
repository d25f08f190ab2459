"""Other language models, asked over HTTP: clients, retries, a journal of what was answered."""
