"""Requests to other language models over HTTP: clients, retries, and a journal of the answers."""
